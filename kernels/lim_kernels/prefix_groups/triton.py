"""Prefix groups in Triton: a matrix of shared lengths, then each row's place in the tree. A program a row in both.

Rows that share nothing, the usual case, are done after one comparison each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.triton_support import plan_block

_PROBES = 8  # points compared at once: bisection waits for memory at every step


@triton.jit
def shared_kernel(
    slots_ptr,
    lens_ptr,
    apart_ptr,
    shared_ptr,
    batch,
    granule,
    stride_slots,
    APART: tl.constexpr,
    STEPS: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Leading tokens that one row shares with every other, in multiples of `granule`."""
    row = tl.program_id(0)
    others = tl.arange(0, BLOCK_ROWS)
    there = (others < batch) & (others != row)
    if APART:
        mine_apart = tl.load(apart_ptr + row)
        there = there & (tl.load(apart_ptr + others, mask=there, other=1) == 0) & (mine_apart == 0)
    mine_ptr = slots_ptr + row.to(tl.int64) * stride_slots
    theirs_ptr = slots_ptr + others.to(tl.int64) * stride_slots
    lens = tl.minimum(tl.load(lens_ptr + others, mask=there, other=0), tl.load(lens_ptr + row)).to(tl.int32)
    # In granules: `low` are shared, more than `high` are not.
    high = tl.where(there, (lens - 1) // granule, 0)
    low = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    first = high > 0
    first_mine = tl.load(mine_ptr + granule - 1 + others * 0, mask=first, other=0)
    first_theirs = tl.load(theirs_ptr + granule - 1, mask=first, other=0)
    high = tl.where((first_mine == first_theirs) & (first_mine != 0), high, 0)
    if tl.max(high, axis=0) > 0:
        low = tl.minimum(high, 1)
        probes = 1 + tl.arange(0, PROBES)
        for _ in range(STEPS):
            # [BLOCK_ROWS, PROBES], ascending in (low, high]; the last one is high.
            points = low[:, None] + ((high - low)[:, None] * probes[None, :] + PROBES - 1) // PROBES
            open = (high > low)[:, None] & (points > low[:, None])
            at = points * granule - 1
            mine = tl.load(mine_ptr + at, mask=open, other=0)
            theirs = tl.load(theirs_ptr[:, None] + at, mask=open, other=-1)
            equal = open & (mine == theirs)
            reached = tl.max(tl.where(equal, points, low[:, None]), axis=1)
            missed = tl.min(tl.where(open & (mine != theirs), points, (high + 1)[:, None]), axis=1)
            low = reached
            high = tl.maximum(missed - 1, low)
    tl.store(shared_ptr + row * BLOCK_ROWS + others, low * granule)


@triton.jit
def load_shared(shared_ptr, row, cap, BLOCK_ROWS: tl.constexpr):
    """A row's shared lengths, cut to `cap`."""
    return tl.minimum(tl.load(shared_ptr + row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)), cap)


@triton.jit
def group_at(shared_ptr, mine, row, depth, cap, BLOCK_ROWS: tl.constexpr):
    """The group that ends at `depth`, one of the row's shared lengths `mine`."""
    rows = tl.arange(0, BLOCK_ROWS)
    leader = tl.min(tl.where((mine >= depth) | (rows == row), rows, BLOCK_ROWS), axis=0)
    leaves = (load_shared(shared_ptr, leader, cap, BLOCK_ROWS) == depth) & (rows > leader)
    return tl.min(tl.where(leaves, rows, BLOCK_ROWS), axis=0)


@triton.jit
def tree_kernel(
    shared_ptr,
    apart_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    parents_ptr,
    members_ptr,
    own_starts_ptr,
    paths_ptr,
    followed_ptr,
    batch,
    lead,
    APART: tl.constexpr,
    MAX_LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One row's place in the tree, and the group that it adds to it, if any."""
    row = tl.program_id(0)
    rows = tl.arange(0, BLOCK_ROWS)
    beyond = 0x7FFFFFFF
    mine = load_shared(shared_ptr, row, beyond, BLOCK_ROWS)
    # The last of its levels, or no limit where it has fewer: rows that share more have levels of their own.
    cap = tl.full([], 0, dtype=tl.int32)
    for _ in range(MAX_LEVELS):
        cap = tl.min(tl.where(mine > cap, mine, beyond), axis=0)
    mine = tl.minimum(mine, cap)
    own_start = tl.max(mine, axis=0)
    followed = tl.max(tl.where(rows < row, mine, 0), axis=0)
    path = tl.full([], -1, dtype=tl.int32)
    parent = tl.full([], -1, dtype=tl.int32)
    start = tl.full([], 0, dtype=tl.int32)
    end = tl.full([], 0, dtype=tl.int32)
    count = tl.full([], 0, dtype=tl.int32)
    if own_start > 0:
        path = group_at(shared_ptr, mine, row, own_start, cap, BLOCK_ROWS)
    if followed > 0 and group_at(shared_ptr, mine, row, followed, cap, BLOCK_ROWS) == row:
        inside = (mine >= followed) | (rows == row)
        count = tl.sum(inside.to(tl.int32), axis=0)
        end = followed
        start = tl.max(tl.where(mine < followed, mine, 0), axis=0)
        places = tl.cumsum(inside.to(tl.int32), axis=0) - 1
        tl.store(members_ptr + row * batch + places, rows, mask=inside)
        if start > 0:
            parent = group_at(shared_ptr, mine, row, start, cap, BLOCK_ROWS)
    tl.store(counts_ptr + row, count)
    tl.store(starts_ptr + row, start + lead)
    tl.store(ends_ptr + row, end + lead)
    tl.store(parents_ptr + row, parent)
    own_start += lead
    if APART:
        own_start = tl.where(tl.load(apart_ptr + row) == 0, own_start, 0)
    tl.store(own_starts_ptr + row, own_start)
    tl.store(paths_ptr + row, path)
    tl.store(followed_ptr + row, followed)


def find_prefix_groups(
    slots: Tensor, seq_lens: Tensor, *, granule: int, max_levels: int, lead: int, apart: Tensor | None
) -> dict[str, Tensor]:
    """See `api.find_prefix_groups`; the fields of `PrefixGroups` by name."""
    batch, width = slots.shape
    block = plan_block(batch)
    shared = torch.empty(batch, block, dtype=torch.int32, device=slots.device)
    granules, steps = max(1, width // granule), 1
    while granules > 1:
        granules, steps = triton.cdiv(granules, _PROBES), steps + 1
    shared_kernel[(batch,)](
        slots_ptr=slots,
        lens_ptr=seq_lens,
        apart_ptr=apart,
        shared_ptr=shared,
        batch=batch,
        granule=granule,
        stride_slots=slots.stride(0),
        APART=apart is not None,
        STEPS=steps,
        PROBES=_PROBES,
        BLOCK_ROWS=block,
        num_warps=4,
    )
    names = ("counts", "starts", "ends", "parents", "own_starts", "paths", "followed")
    fields = dict(zip(names, torch.empty(len(names), batch, dtype=torch.int32, device=slots.device), strict=True))
    fields["members"] = torch.empty(batch, batch, dtype=torch.int32, device=slots.device)
    tree_kernel[(batch,)](
        shared_ptr=shared,
        apart_ptr=apart,
        batch=batch,
        lead=lead,
        APART=apart is not None,
        MAX_LEVELS=max_levels,
        BLOCK_ROWS=block,
        num_warps=1,
        **{f"{name}_ptr": field for name, field in fields.items()},
    )
    return fields
