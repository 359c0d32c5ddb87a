"""Sets of whole pages (Quest, arXiv 2406.10774), by brute force in float64 and written from the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 16


def pages_of(length: int) -> list[list[int]]:
    """Positions of each page of a context; the last one may not be full."""
    return [list(range(first, min(first + PAGE, length))) for first in range(0, length, PAGE)]


def page_scores(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """How large q·k can be in each page by the bounds of its keys, and how far rounding may take that.

    Args:
        q: [G, D], query heads of one KV head; keys: [L, D] of that head.

    Returns:
        float64 [P] both, P pages; a page's score is the largest of its query heads'.
    """
    scores, errors = [], []
    for positions in pages_of(len(keys)):
        low, high = keys[positions].double().amin(0), keys[positions].double().amax(0)
        terms = torch.maximum(q.double() * low, q.double() * high)
        scores.append(terms.sum(1).amax())
        errors.append((q.shape[1] + 2) * torch.finfo(torch.float32).eps * terms.abs().sum(1).amax())
    return torch.stack(scores), torch.stack(errors)


def explains_pages(served: Sequence[int], q: Tensor, keys: Tensor, budget: int) -> bool:
    """Whether the positions `served` are those of the page of the current token and the best-scored others.

    Scores may be off by rounding: no page left out may score surely higher than one that was kept.
    """
    pages = pages_of(len(keys))
    if len(keys) <= budget:
        return list(served) == list(range(len(keys)))
    kept = sorted({position // PAGE for position in served})
    whole = [position for page in kept for position in pages[page]]
    if list(served) != whole or len(kept) != budget // PAGE or kept[-1] != len(pages) - 1:
        return False
    scores, errors = page_scores(q, keys)
    left = sorted(set(range(len(pages))) - set(kept))
    # The page of the current token is kept whatever it scores.
    worst = min(((scores + errors)[page] for page in kept[:-1]), default=torch.tensor(torch.inf))
    return bool(worst >= max((scores - errors)[page] for page in left))
