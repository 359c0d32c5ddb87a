"""Specification of sets of pages in plain torch, without a host synchronisation."""

import torch
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.reference import candidate_mask, choose_tokens


def choose_pages(
    scores: Tensor, seq_lens: Tensor, *, page: int, most: int, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """See `api.choose_pages`."""
    heads = scores.shape[:2]
    flat, in_row = scores.flatten(0, 1), ((seq_lens + page - 1) // page).repeat_interleave(heads[1])
    budgets = None
    if threshold is not None:
        candidates = candidate_mask(in_row, flat.shape[1], recent=1, sinks=0)
        shares = flat.masked_fill(~candidates, float("-inf")).softmax(1)
        above = (shares > threshold).sum(1).clamp(max=most - 1) + 1
        budgets = above.where(in_row > most, most).to(torch.int32)
    sizes = SetSizes(budget=most, recent=1, sinks=0)
    pages, counts = choose_tokens(flat, in_row, sizes, slots=None, budgets=budgets, recents=None)
    return pages.unflatten(0, heads), counts.unflatten(0, heads)


def expand_pages(pages: Tensor, counts: Tensor, slots: Tensor, seq_lens: Tensor, *, page: int) -> tuple[Tensor, Tensor]:
    """See `api.expand_pages`."""
    lacking = -seq_lens % page
    tokens = counts * page - lacking.unsqueeze(1)
    positions = (pages.long().unsqueeze(3) * page + torch.arange(page, device=pages.device)).flatten(2)
    inside = torch.arange(positions.shape[2], device=pages.device) < tokens.unsqueeze(2)
    expanded = slots.unsqueeze(1).expand(-1, pages.shape[1], -1).gather(2, positions.where(inside, 0))
    return expanded.where(inside, 0), tokens.to(torch.int32)
