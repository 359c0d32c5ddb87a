"""Selection for prefix groups in Triton: the passes of `choose_tokens` over the parts of rows.

A row's own segment is a span, and so is each group's, with scores that its rows have combined. How many tokens each of
them takes is planned first (`triton_plan`). Groups choose into rows of their own, at the places which the tokens have
in the sets of all their rows, and are copied there last. Which groups there are is known on the device alone: what
exists for groups only is launched always, and ends at once where there are none.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.group_selection.triton_plan import groups_of_sets, plan_spans
from lim_kernels.operands import SetSizes
from lim_kernels.prefix_groups import MAX_LEVELS, PrefixGroups
from lim_kernels.select_tokens.triton_choose import choose_in_spans
from lim_kernels.select_tokens.triton_spans import SPAN_COUNT, SPAN_FIELDS, SPAN_OFFSET
from lim_kernels.triton_support import multiprocessors, padded_empty, plan_block, readable_width

__all__ = ["choose_for_groups", "groups_of_sets"]

_TILE = 16  # rows whose scores are combined at once
_BLOCK = 256
_WAVES = 4
_COPIED = 1024


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
    innermost_ptr,
    set_ptr,
    batch,
    stride_set,
    BLOCK: tl.constexpr,
):
    """Copy what a row's groups have chosen into a block of its set."""
    row = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(innermost_ptr + row)
    while group >= 0:
        span = (batch + group).to(tl.int64)
        fields = spans_ptr + span * SPAN_FIELDS
        count = tl.load(fields + SPAN_COUNT)
        offset = tl.load(fields + SPAN_OFFSET)
        here = (places >= offset) & (places < offset + count)
        values = tl.load(set_ptr + span * stride_set + places, mask=here, other=0)
        tl.store(set_ptr + row * stride_set + places, values, mask=here)
        group = tl.load(parents_ptr + group)


def choose_for_groups(
    scores: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    sizes: SetSizes,
    *,
    combine: str,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_for_groups`."""
    batch, length = scores.shape
    if length <= sizes.budget:
        # No row is longer than the budget, so there are no groups.
        return choose_in_spans(scores, seq_lens, sizes, slots=slots)
    found = {
        "counts_ptr": groups.counts,
        "starts_ptr": groups.starts,
        "ends_ptr": groups.ends,
        "members_ptr": groups.members,
        "batch": batch,
        "BLOCK_ROWS": plan_block(batch),
    }
    path = {"parents_ptr": groups.parents, "innermost_ptr": groups.innermost}
    spans = plan_spans(seq_lens, groups, sizes)
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
    sets, counts = choose_in_spans(scores, seq_lens, sizes, slots=slots, combined=combined, spans=spans)
    copy_kernel[(triton.cdiv(sizes.budget, _COPIED), batch)](
        spans_ptr=spans,
        set_ptr=sets,
        batch=batch,
        stride_set=sets.stride(0),
        BLOCK=_COPIED,
        num_warps=4,
        **path,
    )
    return sets[:batch], counts[:batch]
