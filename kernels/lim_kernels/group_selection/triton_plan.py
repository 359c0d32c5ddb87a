"""How the budget of rows is shared with their prefix groups, in Triton, and which groups their sets form.

Both follow from lengths and groups alone. A program a row and a program a group, each of which walks the path from the
outermost group to its own: rows come first, so that group g is program B + g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.prefix_groups import MAX_LEVELS, PrefixGroups
from lim_kernels.select_tokens.triton_spans import SPAN_COUNT, SPAN_FIELDS, SPAN_OFFSET, store_span
from lim_kernels.triton_support import per_row_empty, plan_block

_LEVELS = triton.next_power_of_2(MAX_LEVELS)


@triton.jit
def path_to(parents_ptr, group, LEVELS: tl.constexpr):
    """A group (-1: none) and those around it, innermost first, and how many they are."""
    levels = tl.arange(0, LEVELS)
    path = tl.full([LEVELS], -1, dtype=tl.int32)
    depth = 0
    while group >= 0:
        path = tl.where(levels == depth, group, path)
        depth += 1
        group = tl.load(parents_ptr + group)
    return path, depth


@triton.jit
def at_depth(path, depth, LEVELS: tl.constexpr):
    """One group of a path."""
    return tl.max(tl.where(tl.arange(0, LEVELS) == depth, path, -1), axis=0)


@triton.jit
def load_group(
    lens_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    members_ptr,
    group,
    batch,
    recent,
    sinks,
    BLOCK_ROWS: tl.constexpr,
):
    """Positions of a group, how many of its first and last ones are forced, its rows and what they have beyond."""
    start = tl.load(starts_ptr + group)
    end = tl.load(ends_ptr + group)
    places = tl.arange(0, BLOCK_ROWS)
    there = places < tl.load(counts_ptr + group)
    rows = tl.load(members_ptr + group.to(tl.int64) * batch + places, mask=there, other=0)
    # [BLOCK_ROWS]
    rests = tl.load(lens_ptr + rows, mask=there, other=0).to(tl.int32) - end
    shortest = tl.min(tl.where(there, rests, 0x7FFFFFFF), axis=0)
    head = tl.maximum(tl.minimum(sinks, end) - start, 0)
    tail = tl.minimum(end - start - head, tl.maximum(recent - shortest, 0))
    return start, end, head, tail, rows, there, tl.where(there, rests, 0)


@triton.jit(do_not_specialize=["batch", "recent", "sinks"])
def force_kernel(
    lens_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    parents_ptr,
    members_ptr,
    own_starts_ptr,
    innermost_ptr,
    forced_ptr,
    batch,
    recent,
    sinks,
    BLOCK_ROWS: tl.constexpr,
):
    """How many positions are forced in one row, or in one group and those around it."""
    span = tl.program_id(0)
    group = span - batch
    total = tl.full([], 0, dtype=tl.int32)
    if span < batch:
        own_start = tl.load(own_starts_ptr + span)
        end = tl.load(lens_ptr + span).to(tl.int32)
        total += tl.minimum(end - own_start, tl.maximum(tl.minimum(sinks, end) - own_start, 0) + recent)
        group = tl.load(innermost_ptr + span)
    elif tl.load(counts_ptr + group) == 0:
        group = -1
    while group >= 0:
        _start, _end, head, tail, _rows, _there, _rests = load_group(
            lens_ptr, counts_ptr, starts_ptr, ends_ptr, members_ptr, group, batch, recent, sinks, BLOCK_ROWS
        )
        total += head + tail
        group = tl.load(parents_ptr + group)
    tl.store(forced_ptr + span, total)


@triton.jit(do_not_specialize=["batch", "budget", "recent", "sinks"])
def plan_kernel(
    lens_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    parents_ptr,
    members_ptr,
    own_starts_ptr,
    innermost_ptr,
    forced_ptr,
    spans_ptr,
    batch,
    budget,
    recent,
    sinks,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The span of one row's own segment, or of one group; an empty one where there is no such group."""
    span = tl.program_id(0)
    group = span - batch
    exists = tl.load(counts_ptr + group, mask=span >= batch, other=0) > 0
    lowest = tl.where(exists, group, tl.load(innermost_ptr + span, mask=span < batch, other=-1))
    path, depth = path_to(parents_ptr, lowest, LEVELS)
    # From the outermost group on: how many tokens are taken before it, and what it takes.
    offset = tl.full([], 0, dtype=tl.int32)
    begin = tl.full([], 0, dtype=tl.int32)
    end = tl.full([], 0, dtype=tl.int32)
    head = tl.full([], 0, dtype=tl.int32)
    tail = tl.full([], 0, dtype=tl.int32)
    count = tl.full([], 0, dtype=tl.int32)
    while depth > 0:
        depth -= 1
        offset += count
        at = at_depth(path, depth, LEVELS)
        begin, end, head, tail, rows, there, rests = load_group(
            lens_ptr, counts_ptr, starts_ptr, ends_ptr, members_ptr, at, batch, recent, sinks, BLOCK_ROWS
        )
        owed = tl.load(forced_ptr + rows, mask=there, other=0) - tl.load(forced_ptr + batch + at)
        available = budget - offset
        free = tl.maximum(available - head - tail - owed, 0)
        candidates = tl.maximum(rests + end - begin - head - tail - owed, 1)
        fair = (free.to(tl.int64) * (rests - owed) // candidates).to(tl.int32)
        needs = tl.minimum(tl.minimum(rests, available - head), owed + fair)
        count = tl.minimum(end - begin, available - tl.max(needs, axis=0))
        tail = tl.minimum(tail, count - head)
    row = tl.where(span < batch, span, 0)
    if span < batch:
        offset += count
        begin = tl.load(own_starts_ptr + span)
        end = tl.load(lens_ptr + span).to(tl.int32)
        count = tl.minimum(budget - offset, end - begin)
        head = tl.maximum(tl.minimum(sinks, end) - begin, 0)
        tail = tl.minimum(recent, count - head)
        group = -1
    elif exists:
        row = tl.load(members_ptr + group.to(tl.int64) * batch)
    store_span(spans_ptr, span, row, begin, end, begin + head, end - tail, count, offset, group)


@triton.jit(do_not_specialize=["batch", "smallest"])
def set_groups_kernel(
    spans_ptr,
    group_counts_ptr,
    parents_ptr,
    members_ptr,
    innermost_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    set_parents_ptr,
    own_starts_ptr,
    set_innermost_ptr,
    already_read_ptr,
    set_counts_ptr,
    batch,
    smallest,
    LEVELS: tl.constexpr,
):
    """What one row has for itself in its set, or what one group has that is large enough."""
    span = tl.program_id(0)
    group = span - batch
    count = tl.load(group_counts_ptr + group, mask=span >= batch, other=0)
    lowest = tl.where(count > 0, group, tl.load(innermost_ptr + span, mask=span < batch, other=-1))
    path, depth = path_to(parents_ptr, lowest, LEVELS)
    # From the outermost group on: the last one that is large enough, where it starts and ends, and the one before it.
    last = tl.full([], -1, dtype=tl.int32)
    parent = tl.full([], -1, dtype=tl.int32)
    start = tl.full([], 0, dtype=tl.int32)
    end = tl.full([], 0, dtype=tl.int32)
    already_read = tl.full([], 0, dtype=tl.int32)
    while depth > 0:
        depth -= 1
        at = at_depth(path, depth, LEVELS)
        fields = spans_ptr + (batch + at).to(tl.int64) * SPAN_FIELDS
        reached = tl.load(fields + SPAN_COUNT) + tl.load(fields + SPAN_OFFSET)
        large = reached - end >= smallest
        parent = tl.where(large, last, parent)
        start = tl.where(large, end, start)
        last = tl.where(large, at, last)
        end = tl.where(large, reached, end)
        leader = tl.load(members_ptr + at.to(tl.int64) * batch)
        already_read = tl.where(large & (leader != span), reached, already_read)
    if span < batch:
        tl.store(own_starts_ptr + span, end)
        tl.store(set_innermost_ptr + span, last)
        tl.store(already_read_ptr + span, already_read)
        fields = spans_ptr + span.to(tl.int64) * SPAN_FIELDS
        tl.store(set_counts_ptr + span, tl.load(fields + SPAN_COUNT) + tl.load(fields + SPAN_OFFSET))
    else:
        exists = (count > 0) & (last == group)
        tl.store(counts_ptr + group, tl.where(exists, count, 0))
        tl.store(starts_ptr + group, tl.where(exists, start, 0))
        tl.store(ends_ptr + group, tl.where(exists, end, 0))
        tl.store(set_parents_ptr + group, tl.where(exists, parent, -1))


def plan_spans(seq_lens: Tensor, groups: PrefixGroups, sizes: SetSizes) -> Tensor:
    """int32 [2B, SPAN_FIELDS], the span of each row's own segment, then of each group; empty where there is none."""
    batch, device = len(seq_lens), seq_lens.device
    forced = torch.empty(2 * batch, dtype=torch.int32, device=device)
    spans = torch.empty(2 * batch, SPAN_FIELDS.value, dtype=torch.int32, device=device)
    planned = {
        "lens_ptr": seq_lens,
        "counts_ptr": groups.counts,
        "starts_ptr": groups.starts,
        "ends_ptr": groups.ends,
        "parents_ptr": groups.parents,
        "members_ptr": groups.members,
        "own_starts_ptr": groups.own_starts,
        "innermost_ptr": groups.innermost,
        "forced_ptr": forced,
        "batch": batch,
        "recent": sizes.recent,
        "sinks": sizes.sinks,
        "BLOCK_ROWS": plan_block(batch),
        "num_warps": 1,
    }
    force_kernel[(2 * batch,)](**planned)
    plan_kernel[(2 * batch,)](spans_ptr=spans, budget=sizes.budget, LEVELS=_LEVELS, **planned)
    return spans


def groups_of_sets(
    seq_lens: Tensor, groups: PrefixGroups, sizes: SetSizes, *, smallest: int
) -> tuple[PrefixGroups, Tensor]:
    """See `api.groups_of_sets`."""
    batch = len(seq_lens)
    per_row = per_row_empty(8, batch, device=seq_lens.device)
    counts, starts, ends, parents, own_starts, innermost, already_read, set_counts = per_row
    in_sets = PrefixGroups(counts, starts, ends, parents, groups.members, own_starts, innermost, already_read)
    set_groups_kernel[(2 * batch,)](
        spans_ptr=plan_spans(seq_lens, groups, sizes),
        group_counts_ptr=groups.counts,
        parents_ptr=groups.parents,
        members_ptr=groups.members,
        innermost_ptr=groups.innermost,
        counts_ptr=in_sets.counts,
        starts_ptr=in_sets.starts,
        ends_ptr=in_sets.ends,
        set_parents_ptr=in_sets.parents,
        own_starts_ptr=in_sets.own_starts,
        set_innermost_ptr=in_sets.innermost,
        already_read_ptr=in_sets.already_read,
        set_counts_ptr=set_counts,
        batch=batch,
        smallest=smallest,
        LEVELS=_LEVELS,
        num_warps=1,
    )
    return in_sets, set_counts
