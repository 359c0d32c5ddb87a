"""Sets whose size and window follow the attention that they hold, judged in float64 and by no binning at all."""

import torch
from torch import Tensor

BINNED = 2 ** (1 / 16)
"""What binning weights by 1/16 octave may do to a share."""


def explains_adaptive(
    served: list[int],
    scores: Tensor,
    *,
    budget: int,
    sinks: int,
    top_p: float | None = None,
    floor: int = 1,
    recent: int | None = None,
    error: float = 1e-6,
) -> bool:
    """Whether `served` can be the set of a row longer than the budget.

    Args:
        served: ascending positions.
        scores: float64 [L], the row's aggregated weights.
        recent: length of the window; None: it is found by the attention that it holds.
        error: relative, of a weight.
    """
    shares = scores / scores.sum()
    slack = BINNED * (1 + error)
    windows = [recent]
    if recent is None:
        parts = [(max(1, budget * part // 16), part / 16) for part in range(1, 9)]
        held = [(window, float(shares[-window:].sum()), part) for window, part in parts]
        surely = [window for window, share, part in held if share >= part * slack]
        least = max(parts[0][0], min(32, budget // 4))
        windows = [
            max(window, least)
            for window, share, part in held
            if window >= max(surely, default=1) and (share >= part / slack or window == parts[0][0])
        ]
    return any(
        _explained(served, shares, window, budget, sinks, top_p, floor, error)
        for window in windows
        if window is not None
    )


def _explained(
    served: list[int],
    shares: Tensor,
    window: int,
    budget: int,
    sinks: int,
    top_p: float | None,
    floor: int,
    error: float,
) -> bool:
    length, slack = len(shares), BINNED * (1 + error)
    kept = torch.zeros(length, dtype=torch.bool)
    kept[served] = True
    forced = torch.zeros(length, dtype=torch.bool)
    forced[:sinks] = True
    forced[length - window :] = True
    free, left = shares[kept & ~forced], shares[~kept]
    if (forced & ~kept).any() or (len(free) and len(left) and free.min() * (1 + error) < left.max() * (1 - error)):
        return False
    size, least = len(served), min(budget, max(floor, sinks + window + 1))
    if top_p is None or not least <= size <= budget:
        return size == budget
    held = float(shares[kept].sum())
    enough = size == budget or held >= top_p / slack - 1e-6
    none_too_many = size == least or held - float(free.min()) <= top_p * slack + 1e-6
    return enough and none_too_many
