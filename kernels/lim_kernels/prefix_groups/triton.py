"""Prefix groups in Triton: a matrix of shared lengths, then each row's place in the tree. A program a row in both.

Rows that share nothing, the usual case, are done after one comparison each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.prefix_groups.state import MAX_LEVELS, PrefixGroups
from lim_kernels.triton_support import per_row_empty, plan_block

_PROBES = 8  # points compared at once: bisection waits for memory at every step


@triton.jit(do_not_specialize=["batch", "granule"])
def shared_kernel(
    slots_ptr,
    lens_ptr,
    uses_set_ptr,
    shared_ptr,
    batch,
    granule,
    stride_slots,
    USES_SET: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Leading tokens that one row shares with every other, in multiples of `granule`."""
    row = tl.program_id(0)
    others = tl.arange(0, BLOCK_ROWS)
    there = (others < batch) & (others != row)
    if USES_SET:
        mine_uses_set = tl.load(uses_set_ptr + row)
        there = there & (tl.load(uses_set_ptr + others, mask=there, other=1) == 0) & (mine_uses_set == 0)
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
        while tl.max(high - low, axis=0) > 0:
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
    tl.store(shared_ptr + row.to(tl.int64) * BLOCK_ROWS + others, low * granule)


@triton.jit
def load_shared(shared_ptr, row, cap, BLOCK_ROWS: tl.constexpr):
    """A row's shared lengths, cut to `cap`."""
    return tl.minimum(tl.load(shared_ptr + row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)), cap)


@triton.jit
def group_at(shared_ptr, mine, row, depth, cap, BLOCK_ROWS: tl.constexpr):
    """The group that ends at `depth`, one of the row's shared lengths `mine`."""
    rows = tl.arange(0, BLOCK_ROWS)
    leader = tl.min(tl.where((mine >= depth) | (rows == row), rows, BLOCK_ROWS), axis=0)
    leaves = (load_shared(shared_ptr, leader, cap, BLOCK_ROWS) == depth) & (rows > leader)
    return tl.min(tl.where(leaves, rows, BLOCK_ROWS), axis=0)


@triton.jit(do_not_specialize=["batch", "set_columns"])
def tree_kernel(
    shared_ptr,
    uses_set_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    parents_ptr,
    members_ptr,
    own_starts_ptr,
    innermost_ptr,
    already_read_ptr,
    batch,
    set_columns,
    USES_SET: tl.constexpr,
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
    already_read = tl.max(tl.where(rows < row, mine, 0), axis=0)
    path = tl.full([], -1, dtype=tl.int32)
    parent = tl.full([], -1, dtype=tl.int32)
    start = tl.full([], 0, dtype=tl.int32)
    end = tl.full([], 0, dtype=tl.int32)
    count = tl.full([], 0, dtype=tl.int32)
    if own_start > 0:
        path = group_at(shared_ptr, mine, row, own_start, cap, BLOCK_ROWS)
    if already_read > 0 and group_at(shared_ptr, mine, row, already_read, cap, BLOCK_ROWS) == row:
        inside = (mine >= already_read) | (rows == row)
        count = tl.sum(inside.to(tl.int32), axis=0)
        end = already_read
        start = tl.max(tl.where(mine < already_read, mine, 0), axis=0)
        places = tl.cumsum(inside.to(tl.int32), axis=0) - 1
        tl.store(members_ptr + row.to(tl.int64) * batch + places, rows, mask=inside)
        if start > 0:
            parent = group_at(shared_ptr, mine, row, start, cap, BLOCK_ROWS)
    tl.store(counts_ptr + row, count)
    tl.store(starts_ptr + row, start + set_columns)
    tl.store(ends_ptr + row, end + set_columns)
    tl.store(parents_ptr + row, parent)
    own_start += set_columns
    if USES_SET:
        own_start = tl.where(tl.load(uses_set_ptr + row) == 0, own_start, 0)
    tl.store(own_starts_ptr + row, own_start)
    tl.store(innermost_ptr + row, path)
    tl.store(already_read_ptr + row, already_read)


def empty_groups(batch: int, device: torch.device) -> PrefixGroups:
    """Groups of so many rows, uninitialised."""
    counts, starts, ends, parents, own_starts, innermost, already_read = per_row_empty(7, batch, device=device)
    members = torch.empty(batch, batch, dtype=torch.int32, device=device)
    return PrefixGroups(counts, starts, ends, parents, members, own_starts, innermost, already_read)


def find_prefix_groups(
    slots: Tensor, seq_lens: Tensor, *, granule: int, set_columns: int, uses_set: Tensor | None
) -> PrefixGroups:
    """See `api.find_prefix_groups`."""
    batch = len(slots)
    block = plan_block(batch)
    shared = torch.empty(batch, block, dtype=torch.int32, device=slots.device)
    shared_kernel[(batch,)](
        slots_ptr=slots,
        lens_ptr=seq_lens,
        uses_set_ptr=uses_set,
        shared_ptr=shared,
        batch=batch,
        granule=granule,
        stride_slots=slots.stride(0),
        USES_SET=uses_set is not None,
        PROBES=_PROBES,
        BLOCK_ROWS=block,
        num_warps=4,
    )
    found = empty_groups(batch, slots.device)
    tree_kernel[(batch,)](
        shared_ptr=shared,
        uses_set_ptr=uses_set,
        counts_ptr=found.counts,
        starts_ptr=found.starts,
        ends_ptr=found.ends,
        parents_ptr=found.parents,
        members_ptr=found.members,
        own_starts_ptr=found.own_starts,
        innermost_ptr=found.innermost,
        already_read_ptr=found.already_read,
        batch=batch,
        set_columns=set_columns,
        USES_SET=uses_set is not None,
        MAX_LEVELS=MAX_LEVELS,
        BLOCK_ROWS=block,
        num_warps=1,
    )
    return found
