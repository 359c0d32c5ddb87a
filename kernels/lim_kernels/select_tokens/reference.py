"""Specification of token selection in plain torch, without a host synchronisation; also what a CPU server runs.

Source: LessIsMore (arXiv 2508.07101), unified attention head selection with a stable recency window. For one row of
n tokens, longer than the budget, with H heads and a middle budget of m:

    candidates = positions from the last sink to the first token of the recency window

    score_tokens, "union":
        list_h   = the m candidates of largest logit of head h, largest first, equal ones by lower position
        place(t) = min of rank * H + h over the heads h in whose list t has that rank
        score(t) = -place(t), scaled; -inf if no head lists t
    score_tokens, "max" and "sum":
        score(t) = max, or logsumexp, over heads of logit_h(t) - lse_h

    choose_tokens:
        set = sinks, recency window and the m candidates of largest score, equal ones by lower position; ascending

The m smallest places are the rank-major union "rank 0 of every head in head order, then rank 1, …, duplicates dropped,
cut at m". Equal logits rank by position so that the set depends neither on the device nor on how heads are split over
ranks. A row that is no longer than the budget keeps all its tokens.

What has to be ordered by value and then by position is packed into one int64 (`_top_positions`), so that one top-k
orders by both.
"""

import torch
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.places import rank_unit, shallow_depth


def candidate_mask(seq_lens: Tensor, length: int, *, recent: int | Tensor, sinks: int) -> Tensor:
    """bool [B, L]: positions between the sinks and the recency window of each row, which `recent` [B] may differ."""
    positions = torch.arange(length, device=seq_lens.device)
    return (positions >= sinks) & (positions < (seq_lens - recent).unsqueeze(1))


def within_rows(logits: Tensor, seq_lens: Tensor) -> Tensor:
    """Logits [B, H, L] with -inf at and beyond each row's length."""
    valid = torch.arange(logits.shape[2], device=logits.device) < seq_lens.unsqueeze(1)
    return logits.masked_fill(~valid.unsqueeze(1), float("-inf"))


def score_tokens(
    logits: Tensor,
    lse: Tensor | None,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    aggregate: str,
    first_head: int,
    num_heads: int,
    shallow: bool,
) -> Tensor:
    """See `api.score_tokens`."""
    if aggregate == "union":
        depth = shallow_depth(sizes.middle) if shallow else sizes.middle
        return _union_scores(logits, seq_lens, sizes, depth, first_head=first_head, num_heads=num_heads)
    assert lse is not None
    # [B, H, L]
    log_weights = within_rows(logits, seq_lens) - lse.unsqueeze(2)
    return log_weights.logsumexp(dim=1) if aggregate == "sum" else log_weights.amax(dim=1)


def deepen_scores(
    scores: Tensor, logits: Tensor, seq_lens: Tensor, sizes: SetSizes, *, first_head: int, num_heads: int
) -> None:
    """See `api.deepen_scores`; here all rows get places to the full depth."""
    places = _union_scores(logits, seq_lens, sizes, sizes.middle, first_head=first_head, num_heads=num_heads)
    torch.maximum(scores, places, out=scores)


def choose_tokens(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    slots: Tensor | None,
    budgets: Tensor | None,
    recents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_tokens`."""
    batch, length = scores.shape
    budget, recent = sizes.budget, sizes.recent if recents is None else recents
    candidates = candidate_mask(seq_lens, length, recent=recent, sinks=sizes.sinks)
    forced = ~candidates & (torch.arange(length, device=scores.device) < seq_lens.unsqueeze(1))
    # Forced tokens outrank every candidate, tokens outside the row rank last: one top-k then gives the whole set.
    keys = _ordered(scores) + torch.where(forced, 1 << 34, 0)
    keys = keys.masked_fill(~(forced | candidates), -(1 << 35))
    width = min(budget, length)
    top = _top_positions(keys, width)
    counts = (seq_lens.clamp(max=budget) if budgets is None else torch.minimum(seq_lens, budgets)).to(torch.int32)
    ranks = torch.arange(width, device=scores.device)
    kept = torch.where(ranks < counts.unsqueeze(1), top, length).sort(dim=1).values
    positions = torch.full((batch, budget), -1, dtype=torch.int32, device=scores.device)
    positions[:, :width] = kept.masked_fill(kept == length, -1).to(torch.int32)
    if slots is None:
        return positions, counts
    chosen = torch.zeros_like(positions)
    chosen[:, :width] = slots.gather(1, kept.clamp(max=length - 1)).masked_fill(kept == length, 0)
    return chosen, counts


def _union_scores(
    logits: Tensor, seq_lens: Tensor, sizes: SetSizes, depth: int, *, first_head: int, num_heads: int
) -> Tensor:
    """float32 [B, L]: -key(t) of the module docstring in `rank_unit`s, -inf for a token in no head's list.

    Lists have `depth` tokens, the middle budget or less.
    """
    batch, heads, length = logits.shape
    scores = logits.new_full((batch, length), float("-inf"))
    if sizes.middle == 0:
        return scores
    # No list is longer than the rows.
    middle, depth = min(sizes.middle, length), min(depth, length)
    candidates = candidate_mask(seq_lens, length, recent=sizes.recent, sinks=sizes.sinks)
    keys = _ordered(logits).masked_fill(~candidates.unsqueeze(1), -(1 << 35))
    # [B, H, m], best first
    lists = _top_positions(keys, depth)
    ranks = torch.arange(depth, device=logits.device)
    owners = torch.arange(first_head, first_head + heads, device=logits.device)
    order = -(ranks.unsqueeze(0) * num_heads + owners.unsqueeze(1)).to(torch.float32) * rank_unit(middle, num_heads)
    flat = lists.reshape(batch, heads * depth)
    scores.scatter_reduce_(1, flat, order.reshape(1, -1).expand(batch, -1).contiguous(), reduce="amax")
    return scores.masked_fill(~candidates, float("-inf"))


def _ordered(values: Tensor) -> Tensor:
    """int64 with the order of float32 `values` (-0.0 as 0.0), within ±2**31."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits + (1 << 31)))


def _top_positions(keys: Tensor, k: int) -> Tensor:
    """int64 [..., k]: positions of the k largest keys in order, equal keys by position.

    |keys| < 2**36, and fewer than 2**22 positions.
    """
    length = keys.shape[-1]
    unique = (keys << 22) + (length - 1 - torch.arange(length, device=keys.device))
    return unique.topk(k, dim=-1, sorted=True).indices
