"""What a row of scores chooses among: its span. One a row, from lengths and sizes, or read from memory (SPANS)."""

import triton
import triton.language as tl

SPAN_FIELDS = tl.constexpr(8)
"""Spans are int32 [S, SPAN_FIELDS]; the fields of one are at:"""
SPAN_ROW = tl.constexpr(0)
"""The row of scores and slots that it lies in."""
SPAN_BEGIN = tl.constexpr(1)
SPAN_END = tl.constexpr(2)
"""Its positions are begin … end - 1."""
SPAN_FIRST = tl.constexpr(3)
SPAN_LAST = tl.constexpr(4)
"""Of these first … last - 1 are candidates, the others are forced."""
SPAN_COUNT = tl.constexpr(5)
"""How many tokens are taken."""
SPAN_OFFSET = tl.constexpr(6)
"""From which place of the set on they are written."""
SPAN_COMBINED = tl.constexpr(7)
"""The row of `combined` scores that it is chosen by, or -1: its own row's."""


@triton.jit
def store_span(spans_ptr, span, row, begin, end, first, last, count, offset, combined):
    """Write one of the spans that `load_span` reads."""
    fields = spans_ptr + span.to(tl.int64) * SPAN_FIELDS
    tl.store(fields + SPAN_ROW, row)
    tl.store(fields + SPAN_BEGIN, begin)
    tl.store(fields + SPAN_END, end)
    tl.store(fields + SPAN_FIRST, first)
    tl.store(fields + SPAN_LAST, last)
    tl.store(fields + SPAN_COUNT, count)
    tl.store(fields + SPAN_OFFSET, offset)
    tl.store(fields + SPAN_COMBINED, combined)


@triton.jit
def load_span(
    spans_ptr,
    lens_ptr,
    budgets_ptr,
    recents_ptr,
    row,
    budget,
    recent,
    sinks,
    SPANS: tl.constexpr,
    BUDGETS: tl.constexpr,
    RECENTS: tl.constexpr,
):
    """Of a span: begin and end, the first candidate, the position after the last one, how many tokens are taken."""
    if SPANS:
        fields = spans_ptr + row * SPAN_FIELDS
        begin = tl.load(fields + SPAN_BEGIN)
        end = tl.load(fields + SPAN_END)
        first = tl.load(fields + SPAN_FIRST)
        last = tl.load(fields + SPAN_LAST)
        count = tl.load(fields + SPAN_COUNT)
    else:
        begin = 0
        end = tl.load(lens_ptr + row).to(tl.int32)
        first = sinks
        last = end - (tl.load(recents_ptr + row) if RECENTS else recent)
        count = tl.load(budgets_ptr + row) if BUDGETS else budget
    return begin, end, first, last, count


@triton.jit
def scores_of(scores_ptr, combined_ptr, spans_ptr, row, stride_scores, stride_combined, SPANS: tl.constexpr):
    """Where the scores of a span's positions are: in its row, or in one of `combined`."""
    if SPANS:
        own = scores_ptr + tl.load(spans_ptr + row * SPAN_FIELDS + SPAN_ROW).to(tl.int64) * stride_scores
        combined = tl.load(spans_ptr + row * SPAN_FIELDS + SPAN_COMBINED).to(tl.int64)
        scores_row = tl.where(combined < 0, own, combined_ptr + combined * stride_combined)
    else:
        scores_row = scores_ptr + row * stride_scores
    return scores_row
