"""What a row of scores chooses among: its span. One a row, from lengths and sizes, or read from memory (SPANS)."""

import triton
import triton.language as tl

SPAN_FIELDS = 8
"""Of int32 [S, 8] spans: row of scores and slots; positions begin … end - 1, of which first … last - 1 are candidates,
the others forced; how many are taken; from which place of the set on; the row of `combined` scores instead, or -1."""


@triton.jit
def store_span(spans_ptr, span, row, begin, end, first, last, count, offset, combined):
    """Write one of the spans that `load_span` reads."""
    fields = spans_ptr + span * 8
    tl.store(fields, row)
    tl.store(fields + 1, begin)
    tl.store(fields + 2, end)
    tl.store(fields + 3, first)
    tl.store(fields + 4, last)
    tl.store(fields + 5, count)
    tl.store(fields + 6, offset)
    tl.store(fields + 7, combined)


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
        fields = spans_ptr + row * 8
        begin = tl.load(fields + 1)
        end = tl.load(fields + 2)
        first = tl.load(fields + 3)
        last = tl.load(fields + 4)
        count = tl.load(fields + 5)
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
        own = scores_ptr + tl.load(spans_ptr + row * 8).to(tl.int64) * stride_scores
        combined = tl.load(spans_ptr + row * 8 + 7).to(tl.int64)
        scores_row = tl.where(combined < 0, own, combined_ptr + combined * stride_combined)
    else:
        scores_row = scores_ptr + row * stride_scores
    return scores_row
