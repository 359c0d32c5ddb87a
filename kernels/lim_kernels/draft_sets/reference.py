"""Specification of draft sets in plain torch, on any device, without a host synchronisation.

for each selection layer, row b of length n and set of count m, chosen at length l
    if n <= budget:                                     positions 0 … n - 1
    if b's tenant has the set, and 0 < n - l <= room:   the set's m positions, then l … n - 1
    else:                                               0 … sinks - 1, then n - budget + sinks … n - 1
"""

import torch
from torch import Tensor

from lim_kernels.draft_sets.state import DraftMemory, DraftSizes


def place_drafts(
    memory: DraftMemory, rows: Tensor, tenants: Tensor, slots: Tensor, seq_lens: Tensor, sizes: DraftSizes
) -> tuple[Tensor, Tensor]:
    """See `api.place_drafts`."""
    rows, lens = rows.long(), seq_lens.long().view(1, -1, 1)
    chosen_at = memory.lengths[rows].long().view(1, -1, 1)
    since = lens - chosen_at
    mine = (memory.tenants[rows] == tenants[rows]).view(1, -1, 1)
    whole = lens <= sizes.budget
    has_set = mine & (since > 0) & (since <= sizes.room) & ~whole
    counts = memory.counts[:, rows].long()
    ends = torch.where(has_set, counts + since, lens.clamp(max=sizes.budget))

    columns = torch.arange(sizes.width, device=slots.device)
    behind = chosen_at.unsqueeze(3) + columns - counts.unsqueeze(3)
    # [S, B, H, budget + room]
    in_set = torch.cat((memory.sets[:, rows].long(), behind[..., sizes.budget :]), dim=3)
    in_set = torch.where(columns < counts.unsqueeze(3), in_set, behind)
    skipped = (lens - sizes.budget).clamp(min=0).unsqueeze(3) * (columns >= sizes.sinks)
    positions = torch.where(has_set.unsqueeze(3), in_set, columns + skipped)
    inside = columns < ends.unsqueeze(3)
    positions = positions.where(inside, 0)
    by_row = positions.transpose(0, 1).flatten(1)
    placed = slots.gather(1, by_row).view(positions.transpose(0, 1).shape).transpose(0, 1)
    return placed.where(inside, 0).contiguous(), ends.int()
