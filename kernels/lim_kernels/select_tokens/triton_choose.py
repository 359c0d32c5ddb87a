"""Scores to a set in Triton: short passes over [B, L] scores, each spread over the whole context.

A histogram of binned scores finds the bin in which the m-th best candidate lies. Candidates above the bin are in; those
inside it are collected, and one warp finds exactly which of them are wanted, by score and then by position. The last
pass writes sinks, chosen candidates and window in ascending order. Binning is monotone, so what it can cost is time,
never exactness: where too many candidates share the bin, the row itself is searched.

What a row chooses among is its span. `choose_tokens` has one a row, from lengths and sizes, which may be the row's own
(BUDGETS, RECENTS); `choose_in_spans` reads spans from memory, so that `choose_for_groups` can choose in parts of rows
(SPANS).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.triton_spans import (
    SPAN_COMBINED,
    SPAN_FIELDS,
    SPAN_OFFSET,
    SPAN_ROW,
    load_span,
    scores_of,
)
from lim_kernels.select_tokens.triton_tiles import (
    count_before,
    deciding_bin,
    keys_in_bin,
    nth_key,
    nth_key_of_row,
    number_kept,
    order_key,
    score_bin,
    sum_between,
    tile,
    total,
)
from lim_kernels.triton_support import programs_along, readable_width

_BINS = 2048
_COPIES = 4
_FEW = 256  # candidates of the deciding bin that are listed, usually
_GATHERED = 2048  # and at most
_BLOCK = 2048


@triton.jit
def histogram_kernel(
    scores_ptr,
    combined_ptr,
    spans_ptr,
    lens_ptr,
    budgets_ptr,
    recents_ptr,
    histogram_ptr,
    stride_scores,
    stride_combined,
    width,
    budget,
    recent,
    sinks,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    BUDGETS: tl.constexpr,
    RECENTS: tl.constexpr,
):
    """Count a span's candidates by bin, block by block."""
    row = tl.program_id(1).to(tl.int64)
    begin, end, first, last, count = load_span(
        spans_ptr, lens_ptr, budgets_ptr, recents_ptr, row, budget, recent, sinks, SPANS, BUDGETS, RECENTS
    )
    if end - begin <= count:
        return
    scores_row = scores_of(scores_ptr, combined_ptr, spans_ptr, row, stride_scores, stride_combined, SPANS)
    for block in range(begin // BLOCK + tl.program_id(0), tl.cdiv(last, BLOCK), tl.num_programs(0)):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        candidate = (positions >= first) & (positions < last)
        scores = tl.load(scores_row + positions, mask=positions < width, other=0.0)
        bins = score_bin(scores, BINS)
        # Copies, so that tokens do not queue for one bin. The lowest bin's own count is never asked for.
        copies = (row * COPIES + positions % COPIES) * BINS
        tl.atomic_add(histogram_ptr + copies + bins, 1, mask=candidate & (bins > 0), sem="relaxed")


@triton.jit(do_not_specialize=["stride_sure"])
def collect_kernel(
    scores_ptr,
    combined_ptr,
    spans_ptr,
    lens_ptr,
    budgets_ptr,
    recents_ptr,
    histogram_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    sure_ptr,
    stride_scores,
    stride_combined,
    stride_sure,
    width,
    budget,
    recent,
    sinks,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    BUDGETS: tl.constexpr,
    RECENTS: tl.constexpr,
):
    """List the candidates of the deciding bin, and count those above it, block by block."""
    row = tl.program_id(1).to(tl.int64)
    begin, end, first, last, count = load_span(
        spans_ptr, lens_ptr, budgets_ptr, recents_ptr, row, budget, recent, sinks, SPANS, BUDGETS, RECENTS
    )
    start = begin // BLOCK + tl.program_id(0)
    if (end - begin <= count) | (start * BLOCK >= end):
        return
    middle = count - (first - begin) - (end - last)
    found, wanted = deciding_bin(histogram_ptr + row * COPIES * BINS, middle, BINS, COPIES)
    if tl.program_id(0) == 0:
        tl.store(decision_ptr + row * 2, found)
        tl.store(decision_ptr + row * 2 + 1, wanted)
    scores_row = scores_of(scores_ptr, combined_ptr, spans_ptr, row, stride_scores, stride_combined, SPANS)
    for block in range(start, tl.cdiv(end, BLOCK), tl.num_programs(0)):
        positions = block * BLOCK + tile(BLOCK)
        candidate = (positions >= first) & (positions < last)
        scores = tl.load(scores_row + positions, mask=positions < width, other=0.0)
        bins = score_bin(scores, BINS)
        tl.store(sure_ptr + row * stride_sure + block, total(candidate & (bins > found)))
        undecided = candidate & (bins == found)
        listed, places = number_kept(undecided)
        if listed > 0:
            places += tl.atomic_add(num_gathered_ptr + row, listed, sem="relaxed")
            keys = order_key(scores, positions)
            tl.store(gathered_ptr + row * GATHERED + places, keys, mask=undecided & (places < GATHERED))


@triton.jit
def decide_kernel(
    spans_ptr,
    lens_ptr,
    budgets_ptr,
    recents_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    bound_ptr,
    budget,
    recent,
    sinks,
    FEW: tl.constexpr,
    GATHERED: tl.constexpr,
    SPANS: tl.constexpr,
    BUDGETS: tl.constexpr,
    RECENTS: tl.constexpr,
):
    """The key that a candidate of the deciding bin must reach. One warp a row: bisection waits for no other."""
    row = tl.program_id(0).to(tl.int64)
    begin, end, _first, _last, count = load_span(
        spans_ptr, lens_ptr, budgets_ptr, recents_ptr, row, budget, recent, sinks, SPANS, BUDGETS, RECENTS
    )
    if end - begin <= count:
        return
    wanted = tl.load(decision_ptr + row * 2 + 1)
    gathered = tl.load(num_gathered_ptr + row)
    if gathered > GATHERED:
        return
    keys = gathered_ptr + row * GATHERED
    if wanted == 0:
        bound = tl.full([], 1 << 54, dtype=tl.int64)
    elif gathered <= FEW:
        bound = nth_key(keys, gathered, wanted, FEW)
    else:
        bound = nth_key(keys, gathered, wanted, GATHERED)
    tl.store(bound_ptr + row, bound)


@triton.jit(do_not_specialize=["stride_sure"])
def emit_kernel(
    scores_ptr,
    combined_ptr,
    spans_ptr,
    lens_ptr,
    budgets_ptr,
    recents_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    bound_ptr,
    sure_ptr,
    slots_ptr,
    set_ptr,
    counts_ptr,
    stride_scores,
    stride_combined,
    stride_sure,
    stride_slots,
    stride_set,
    width,
    set_width,
    budget,
    recent,
    sinks,
    BINS: tl.constexpr,
    FEW: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    SPANS: tl.constexpr,
    BUDGETS: tl.constexpr,
    RECENTS: tl.constexpr,
):
    """Write a span's share of the set, in order, block by block; a row within the budget keeps everything."""
    row = tl.program_id(1).to(tl.int64)
    begin, end, first, last, count = load_span(
        spans_ptr, lens_ptr, budgets_ptr, recents_ptr, row, budget, recent, sinks, SPANS, BUDGETS, RECENTS
    )
    set_row = set_ptr + row * stride_set
    # Where the span's scores and slots are, where in the set its tokens go, and where the whole set ends.
    if SPANS:
        source = tl.load(spans_ptr + row * SPAN_FIELDS + SPAN_ROW).to(tl.int64)
        offset = tl.load(spans_ptr + row * SPAN_FIELDS + SPAN_OFFSET)
        shared = tl.load(spans_ptr + row * SPAN_FIELDS + SPAN_COMBINED) >= 0
        written = offset + count
    else:
        source = row
        offset = 0
        shared = False
        written = tl.minimum(end, count)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + row, written)
    # Fill what lies after the set. Sets of groups are copied to their rows' later, and have no end of their own.
    unused = 0 if TO_SLOTS else -1
    if not shared:
        for block in range(written // BLOCK + tl.program_id(0), tl.cdiv(set_width, BLOCK), tl.num_programs(0)):
            columns = block * BLOCK + tile(BLOCK)
            tl.store(set_row + columns, unused, mask=(columns >= written) & (columns < set_width))
    for block in range(begin // BLOCK + tl.program_id(0), tl.cdiv(end, BLOCK), tl.num_programs(0)):
        start = block * BLOCK
        positions = start + tile(BLOCK)
        # Which of the block's tokens are kept, and at which places of the set.
        if end - begin <= count:
            kept = positions < end
            if SPANS:
                kept = kept & (positions >= begin)
            places = positions - begin + offset
        else:
            found = tl.load(decision_ptr + row * 2)
            gathered = tl.load(num_gathered_ptr + row)
            keys = gathered_ptr + row * GATHERED
            scores_row = scores_of(scores_ptr, combined_ptr, spans_ptr, row, stride_scores, stride_combined, SPANS)
            # Kept are forced tokens, candidates of better bins, and those of the deciding bin that reach its bound. If
            # that bin's candidates did not fit into their list, nobody has found the bound yet: the row is searched.
            if gathered <= GATHERED:
                bound = tl.load(bound_ptr + row)
            else:
                wanted = tl.load(decision_ptr + row * 2 + 1)
                bound = nth_key_of_row(scores_row, width, first, last, found, wanted, BINS, BLOCK)
            candidate = (positions >= first) & (positions < last)
            scores = tl.load(scores_row + positions, mask=positions < width, other=0.0)
            bins = score_bin(scores, BINS)
            decided = (bins == found) & (order_key(scores, positions) >= bound)
            forced = (positions < first) | ((positions >= last) & (positions < end))
            kept = forced | (candidate & ((bins > found) | decided))
            if SPANS:
                kept = kept & (positions >= begin)

            # Places follow from how many tokens before this block are kept: candidates of better bins, counted block by
            # block in `collect_kernel`, those of the deciding bin that reach the bound, and forced ones.
            before = sum_between(sure_ptr + row * stride_sure, begin // BLOCK, block)
            if gathered <= FEW:
                before += count_before(keys, gathered, bound, start, FEW)
            elif gathered <= GATHERED:
                before += count_before(keys, gathered, bound, start, GATHERED)
            else:
                for other in range(0, start, BLOCK):
                    theirs = keys_in_bin(scores_row, width, other, first, last, found, BINS, BLOCK)
                    before += tl.sum((theirs >= bound).to(tl.int32), axis=0)
            before += tl.maximum(tl.minimum(start, first) - begin, 0) + tl.maximum(start - last, 0) + offset
            _, places = number_kept(kept)
            places += before
        values = positions
        if TO_SLOTS:
            values = tl.load(slots_ptr + source * stride_slots + positions, mask=kept, other=0)
        tl.store(set_row + places, values, mask=kept)


def choose_in_spans(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    slots: Tensor | None,
    budgets: Tensor | None = None,
    recents: Tensor | None = None,
    combined: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A set of each span, at its offset, and where it ends; without `spans`, `api.choose_tokens`.

    Args:
        scores, seq_lens, sizes, slots, budgets, recents: as in `choose_tokens`.
        combined: float32 [G, L], scores of the spans that have theirs there.
        spans: int32 [S, SPAN_FIELDS], instead of `budgets` and `recents`; those with `combined` scores write their
            share of the set alone.
    """
    budget, length = sizes.budget, scores.shape[1]
    rows = scores.shape[0] if spans is None else spans.shape[0]
    device = scores.device
    blocks = triton.cdiv(length, _BLOCK)
    grid = programs_along(blocks, rows, device), rows
    chosen = torch.empty(rows, budget, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    # One allocation, so that one fill clears both.
    zeroed = torch.zeros(rows * (_COPIES * _BINS + 1), dtype=torch.int32, device=device)
    histogram, num_gathered = zeroed[:-rows], zeroed[-rows:]
    gathered = torch.empty(rows, _GATHERED, dtype=torch.int64, device=device)
    decision = torch.empty(rows, 2, dtype=torch.int32, device=device)
    bound = torch.empty(rows, dtype=torch.int64, device=device)
    sure = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    span = {
        "spans_ptr": spans,
        "lens_ptr": seq_lens,
        "budgets_ptr": budgets,
        "recents_ptr": recents,
        "budget": budget,
        "recent": sizes.recent,
        "sinks": sizes.sinks,
        "SPANS": spans is not None,
        "BUDGETS": budgets is not None,
        "RECENTS": recents is not None,
    }
    read = {
        "scores_ptr": scores,
        "combined_ptr": combined,
        "stride_scores": scores.stride(0),
        "stride_combined": 0 if combined is None else combined.stride(0),
        "width": readable_width(scores) if combined is None else min(readable_width(scores), readable_width(combined)),
        "BINS": _BINS,
        "BLOCK": _BLOCK,
    }
    decided = {"gathered_ptr": gathered, "num_gathered_ptr": num_gathered, "decision_ptr": decision}
    if length > budget or budgets is not None:
        histogram_kernel[grid](histogram_ptr=histogram, COPIES=_COPIES, num_warps=8, **read, **span)
        collect_kernel[grid](
            histogram_ptr=histogram,
            sure_ptr=sure,
            stride_sure=sure.stride(0),
            COPIES=_COPIES,
            GATHERED=_GATHERED,
            num_warps=8,
            **decided,
            **read,
            **span,
        )
        decide_kernel[(rows,)](bound_ptr=bound, FEW=_FEW, GATHERED=_GATHERED, num_warps=1, **decided, **span)
    emit_kernel[grid](
        bound_ptr=bound,
        sure_ptr=sure,
        slots_ptr=slots,
        set_ptr=chosen,
        counts_ptr=counts,
        stride_sure=sure.stride(0),
        stride_slots=0 if slots is None else slots.stride(0),
        stride_set=chosen.stride(0),
        set_width=budget,
        FEW=_FEW,
        GATHERED=_GATHERED,
        TO_SLOTS=slots is not None,
        num_warps=8,
        **decided,
        **read,
        **span,
    )
    return chosen, counts
