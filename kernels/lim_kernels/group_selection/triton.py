"""Selection for prefix groups in Triton: the passes of `choose_tokens` over the parts of rows.

A row's own segment is a span, and so is each group's, with scores that its rows have combined. How many tokens each of
them takes follows from lengths alone and is planned first. Groups choose into rows of their own, at the places which
the tokens have in the sets of all their rows, and are copied there last. Which groups there are is known on the device
alone: what exists for groups only is launched always, and ends at once where there are none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.prefix_groups import MAX_LEVELS, PrefixGroups
from lim_kernels.select_tokens.triton_choose import SPAN_FIELDS, choose_in_spans, store_span
from lim_kernels.triton_support import multiprocessors, padded_empty, plan_block, readable_width

_TILE = 16  # rows whose scores are combined at once
_BLOCK = 256
_WAVES = 4
_COPIED = 1024


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
    paths_ptr,
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
        group = tl.load(paths_ptr + span)
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
    paths_ptr,
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
    lowest = tl.where(exists, group, tl.load(paths_ptr + span, mask=span < batch, other=-1))
    levels = tl.arange(0, LEVELS)
    path = tl.full([LEVELS], -1, dtype=tl.int32)
    depth = 0
    at = lowest
    while at >= 0:
        path = tl.where(levels == depth, at, path)
        depth += 1
        at = tl.load(parents_ptr + at)
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
        at = tl.max(tl.where(levels == depth, path, -1), axis=0)
        begin, end, head, tail, rows, there, rests = load_group(
            lens_ptr, counts_ptr, starts_ptr, ends_ptr, members_ptr, at, batch, recent, sinks, BLOCK_ROWS
        )
        owed = tl.load(forced_ptr + rows, mask=there, other=0) - tl.load(forced_ptr + batch + at)
        available = budget - offset
        fair = (available.to(tl.int64) * rests // (rests + end - begin)).to(tl.int32)
        wanted = tl.maximum(owed, tl.minimum(fair, available - head - tail))
        needs = tl.minimum(tl.minimum(rests, available - head), wanted)
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


@triton.jit(do_not_specialize=["batch"])
def combine_kernel(
    scores_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    members_ptr,
    combined_ptr,
    batch,
    width,
    stride_scores,
    stride_combined,
    LOGSUMEXP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One score of all rows of a group for each position of its blocks; blocks of all groups in turn."""
    groups = tl.arange(0, BLOCK_ROWS)
    there = groups < batch
    exists = tl.load(counts_ptr + groups, mask=there, other=0) > 0
    firsts = tl.load(starts_ptr + groups, mask=there, other=0) // BLOCK
    lasts = tl.cdiv(tl.load(ends_ptr + groups, mask=there, other=0), BLOCK)
    blocks = tl.where(exists, lasts - firsts, 0)
    after = tl.cumsum(blocks, axis=0)
    for item in range(tl.program_id(0), tl.sum(blocks, axis=0), tl.num_programs(0)):
        group = tl.sum((after <= item).to(tl.int32), axis=0)
        block = item + tl.sum(tl.where(groups == group, firsts + blocks - after, 0), axis=0)
        positions = block * BLOCK + tl.arange(0, BLOCK)
        inside = positions < width
        count = tl.load(counts_ptr + group)
        members = members_ptr + group.to(tl.int64) * batch
        best = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, count, TILE):
            places = first + tl.arange(0, TILE)
            rows = tl.load(members + places, mask=places < count, other=0).to(tl.int64)
            # [TILE, BLOCK]
            scores = tl.load(
                scores_ptr + (rows * stride_scores)[:, None] + positions[None, :],
                mask=(places < count)[:, None] & inside[None, :],
                other=-float("inf"),
            )
            peak = tl.maximum(best, tl.max(scores, axis=0))
            if LOGSUMEXP:
                base = tl.where(peak == -float("inf"), 0.0, peak)
                total = total * tl.exp(best - base) + tl.sum(tl.exp(scores - base[None, :]), axis=0)
            best = peak
        values = best + tl.log(total) if LOGSUMEXP else best
        tl.store(combined_ptr + group.to(tl.int64) * stride_combined + positions, values, mask=inside)


@triton.jit(do_not_specialize=["batch"])
def copy_kernel(
    spans_ptr,
    parents_ptr,
    paths_ptr,
    set_ptr,
    batch,
    stride_set,
    BLOCK: tl.constexpr,
):
    """Copy what a row's groups have chosen into a block of its set."""
    row = tl.program_id(1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(paths_ptr + row)
    while group >= 0:
        span = batch + group
        count = tl.load(spans_ptr + span * 8 + 5)
        offset = tl.load(spans_ptr + span * 8 + 6)
        here = (places >= offset) & (places < offset + count)
        values = tl.load(set_ptr + span.to(tl.int64) * stride_set + places, mask=here, other=0)
        tl.store(set_ptr + row.to(tl.int64) * stride_set + places, values, mask=here)
        group = tl.load(parents_ptr + group)


def choose_for_groups(
    scores: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    *,
    budget: int,
    recent: int,
    sinks: int,
    combine: str,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_for_groups`."""
    batch, length = scores.shape
    if length <= budget:
        # No row is longer than the budget, so there are no groups.
        return choose_in_spans(scores, seq_lens, budget=budget, recent=recent, sinks=sinks, slots=slots)
    found = {
        "counts_ptr": groups.counts,
        "starts_ptr": groups.starts,
        "ends_ptr": groups.ends,
        "members_ptr": groups.members,
        "batch": batch,
        "BLOCK_ROWS": plan_block(batch),
    }
    path = {"parents_ptr": groups.parents, "paths_ptr": groups.paths}
    # Rows first, then groups.
    forced = torch.empty(2 * batch, dtype=torch.int32, device=scores.device)
    spans = torch.empty(2 * batch, SPAN_FIELDS, dtype=torch.int32, device=scores.device)
    planned = {
        "lens_ptr": seq_lens,
        "own_starts_ptr": groups.own_starts,
        "forced_ptr": forced,
        "recent": recent,
        "sinks": sinks,
        "num_warps": 1,
        **path,
        **found,
    }
    force_kernel[(2 * batch,)](**planned)
    plan_kernel[(2 * batch,)](spans_ptr=spans, budget=budget, LEVELS=triton.next_power_of_2(MAX_LEVELS), **planned)
    combined = padded_empty(batch, length, device=scores.device)
    # Half of the rows' blocks at most: a group has two rows or more.
    most = triton.cdiv(length, _BLOCK) * batch // 2 + MAX_LEVELS * batch
    combine_kernel[(min(most, _WAVES * multiprocessors(scores.device)),)](
        scores_ptr=scores,
        combined_ptr=combined,
        width=min(readable_width(scores), readable_width(combined)),
        stride_scores=scores.stride(0),
        stride_combined=combined.stride(0),
        LOGSUMEXP=combine == "logsumexp",
        TILE=_TILE,
        BLOCK=_BLOCK,
        num_warps=4,
        **found,
    )
    sets, counts = choose_in_spans(
        scores,
        seq_lens,
        budget=budget,
        recent=recent,
        sinks=sinks,
        slots=slots,
        combined=combined,
        spans=spans,
    )
    copy_kernel[(triton.cdiv(budget, _COPIED), batch)](
        spans_ptr=spans,
        set_ptr=sets,
        batch=batch,
        stride_set=sets.stride(0),
        BLOCK=_COPIED,
        num_warps=4,
        **path,
    )
    return sets[:batch], counts[:batch]
