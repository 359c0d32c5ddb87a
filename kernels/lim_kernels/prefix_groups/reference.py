"""Specification of prefix groups in plain torch, on any device, without a host synchronisation.

Shared lengths are ultrametric (of three rows, the two smallest of the three pairwise lengths are equal), so the rows
that share d tokens with a row form a class whatever the row, and all classes together form a tree.
"""

import torch
from torch import Tensor

from lim_kernels.prefix_groups.state import MAX_LEVELS, PrefixGroups


def find_prefix_groups(
    slots: Tensor, seq_lens: Tensor, *, granule: int, set_columns: int, uses_set: Tensor | None
) -> PrefixGroups:
    """See `api.find_prefix_groups`."""
    batch, device = slots.shape[0], slots.device
    rows = torch.arange(batch, device=device)
    uses_set = torch.zeros_like(rows, dtype=torch.bool) if uses_set is None else uses_set != 0
    # A row of one token has only its own.
    shared = limit_levels(shared_lengths(slots, seq_lens.where(~uses_set, 1), granule), MAX_LEVELS)
    before = rows.unsqueeze(0) < rows.unsqueeze(1)
    already_read = shared.where(before, 0).amax(1)
    own_starts = shared.amax(1)

    # A row adds at most one group: the one that ends where it leaves the rows before it. Others may have done so there.
    ends = already_read
    _, first = group_at(shared, ends)
    exists = (ends > 0) & (first == rows)
    inside = (shared >= ends.unsqueeze(1)) | (rows.unsqueeze(0) == rows.unsqueeze(1))
    starts = shared.where(shared < ends.unsqueeze(1), 0).amax(1)
    members = torch.where(inside, rows, batch).sort(1).values
    return PrefixGroups(
        counts=inside.sum(1).where(exists, 0).int(),
        starts=(starts.where(exists, 0) + set_columns).int(),
        ends=(ends.where(exists, 0) + set_columns).int(),
        parents=group_at(shared, starts)[1].where(exists & (starts > 0), -1).int(),
        members=members.int(),
        own_starts=(own_starts + set_columns).where(~uses_set, 0).int(),
        innermost=group_at(shared, own_starts)[1].where(own_starts > 0, -1).int(),
        already_read=already_read.int(),
    )


def shared_lengths(slots: Tensor, seq_lens: Tensor, granule: int) -> Tensor:
    """int64 [B, B], leading tokens that two rows share, in multiples of `granule`; 0 on the diagonal."""
    lens = seq_lens.long()
    # In granules: `low` are shared, `high` + 1 are not.
    high = (torch.minimum(lens.unsqueeze(0), lens.unsqueeze(1)) - 1) // granule
    low = torch.zeros_like(high)
    high = high.fill_diagonal_(0)
    for _ in range((slots.shape[1] // granule).bit_length()):
        middle = (low + high + 1) // 2
        at = (middle * granule - 1).clamp(min=0)
        mine, theirs = slots.gather(1, at), slots.gather(1, at.T).T
        equal = (mine == theirs) & (mine != 0) & (middle > low)
        low, high = torch.where(equal, middle, low), torch.where(equal, high, middle - 1).maximum(low)
    return low * granule


def limit_levels(shared: Tensor, max_levels: int) -> Tensor:
    """`shared` with each row's lengths beyond its `max_levels` smallest different ones (0 aside) cut to the last."""
    beyond = torch.iinfo(shared.dtype).max
    cap = torch.zeros_like(shared[:, :1])
    for _ in range(max_levels):
        longer = shared.where(shared > cap, beyond).amin(1, keepdim=True)
        cap = torch.where(longer < beyond, longer, cap)
    return torch.minimum(shared, cap)


def group_at(shared: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each row's class at a depth that is one of its lengths, and the group that ends there, [B] each.

    The group's number is that of the first row that leaves the class's first row exactly at that depth.
    """
    batch = shared.shape[0]
    rows = torch.arange(batch, device=shared.device)
    inside = (shared >= depths.unsqueeze(1)) | (rows.unsqueeze(0) == rows.unsqueeze(1))
    leader = torch.where(inside, rows, batch).amin(1)
    leaves = (shared[leader] == depths.unsqueeze(1)) & (rows.unsqueeze(0) > leader.unsqueeze(1))
    return leader, torch.where(leaves, rows, batch).amin(1)
