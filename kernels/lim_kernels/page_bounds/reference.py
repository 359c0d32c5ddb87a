"""Specification of page bounds in plain torch (Quest, arXiv 2406.10774, section 3.3)."""

import torch
from torch import Tensor

from lim_kernels.attention import gather_slots, group_queries
from lim_kernels.page_bounds.state import PAGE, PageBounds


def bound_pages(bounds: PageBounds, k_cache: Tensor, written: Tensor) -> None:
    """See `api.bound_pages`."""
    ends = torch.ones_like(written, dtype=torch.bool)
    ends[:-1] = (written[1:] != written[:-1] + 1) | (written[:-1] % PAGE == PAGE - 1)
    last = written[ends].long().unsqueeze(1)
    pages = last.squeeze(1) // PAGE
    # [P, 16]; what lies after the last slot is not known, and the last one bounds nothing more.
    members = torch.minimum(pages.unsqueeze(1) * PAGE + torch.arange(PAGE, device=written.device), last)
    keys = gather_slots(k_cache, members).to(bounds.lows.dtype)
    bounds.lows[pages], bounds.highs[pages] = keys.amin(2), keys.amax(2)


def score_pages(q: Tensor, bounds: PageBounds, slots: Tensor, seq_lens: Tensor, *, score_beyond: int) -> Tensor:
    """See `api.score_pages`; float64 operands are scored in float64."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    firsts = slots[:, ::PAGE]
    inside = torch.arange(firsts.shape[1], device=slots.device) * PAGE < seq_lens.unsqueeze(1)
    pages = firsts.where(inside, 0).long() // PAGE
    # [B, H_kv, G, D] by [B, H_kv, D, P]
    queries = group_queries(q, bounds.lows.shape[1]).to(compute)
    lows, highs = (side[pages].to(compute).permute(0, 2, 3, 1) for side in (bounds.lows, bounds.highs))
    return (queries.clamp(min=0) @ highs + queries.clamp(max=0) @ lows).amax(2).float()
