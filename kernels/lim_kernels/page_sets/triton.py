"""Sets of pages in Triton: a program a row and KV head chooses, one a block of a set's slots expands.

A row of a server's length has so few pages that one program holds the scores of all of them. It finds the worst score
that is wanted by bisection, without a histogram, so that nothing has to be cleared or counted by another launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.triton_choose import choose_in_spans
from lim_kernels.select_tokens.triton_tiles import number_kept, order_key, tile, total

MOST_HELD = 8192
"""Pages whose scores one program holds; rows that may have more choose by passes over the scores."""
_BLOCK_SET = 512
_BLOCK_SHARES = 2048


@triton.jit
def bound_of(keys, wanted):
    """A bound that `wanted` >= 1 of a tile's keys reach; keys are distinct but for zeros, which are not asked for."""
    low = tl.min(tl.min(tl.where(keys > 0, keys, 1 << 54), axis=1), axis=0)
    high = tl.max(tl.max(keys, axis=1), axis=0) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = total(keys >= middle)
        if reached >= wanted:
            low = middle
        if reached <= wanted:
            high = tl.where(reached == wanted, middle + 1, middle)
    return low


@triton.jit(do_not_specialize=["threshold"])
def choose_pages_kernel(
    scores_ptr,
    lens_ptr,
    pages_ptr,
    counts_ptr,
    most,
    threshold,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Choose the pages of one row for one KV head."""
    item = tl.program_id(0).to(tl.int64)
    row, head = item // HEADS, item % HEADS
    in_row = tl.cdiv(tl.load(lens_ptr + row).to(tl.int32), PAGE)
    # [BLOCK / 16, 16]
    places = tile(BLOCK)
    out = pages_ptr + item * most
    if in_row <= most:
        tl.store(out + places, places, mask=places < in_row)
        tl.store(counts_ptr + item, in_row)
        return
    candidate = places < in_row - 1
    scores = tl.load(scores_ptr + row * stride_row + head * stride_head + places, mask=candidate, other=-float("inf"))
    wanted = most - 1
    if THRESHOLD:
        weights = tl.where(candidate, tl.exp(scores - tl.max(tl.max(scores, axis=1), axis=0)), 0.0)
        least = threshold * tl.sum(tl.sum(weights, axis=1), axis=0)
        wanted = tl.minimum(wanted, total(weights > least))
    if wanted > 0:
        keys = tl.where(candidate, order_key(scores, places), 0)
        kept = keys >= bound_of(keys, wanted)
        _, ranks = number_kept(kept)
        tl.store(out + ranks, places, mask=kept)
    tl.store(out + wanted, in_row - 1)
    tl.store(counts_ptr + item, wanted + 1)


@triton.jit
def pages_above(scores_row, count, threshold, BLOCK: tl.constexpr):
    """How many of `count` pages have a larger share of their softmax than `threshold`."""
    peak = tl.full([], -float("inf"), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        scores = tl.load(scores_row + places, mask=places < count, other=-float("inf"))
        peak = tl.maximum(peak, tl.max(scores, axis=0))
    weight = tl.full([], 0.0, dtype=tl.float32)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        scores = tl.load(scores_row + places, mask=places < count, other=-float("inf"))
        weight += tl.sum(tl.exp(scores - peak), axis=0)
    above = 0
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        scores = tl.load(scores_row + places, mask=places < count, other=-float("inf"))
        above += tl.sum((tl.exp(scores - peak) > threshold * weight).to(tl.int32), axis=0)
    return above


@triton.jit(do_not_specialize=["threshold"])
def count_above_kernel(
    scores_ptr,
    lens_ptr,
    in_row_ptr,
    budgets_ptr,
    most,
    threshold,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Count one row's pages, and those of them that one KV head's set may have, for rows of any length."""
    item = tl.program_id(0).to(tl.int64)
    row, head = item // HEADS, item % HEADS
    in_row = tl.cdiv(tl.load(lens_ptr + row).to(tl.int32), PAGE)
    tl.store(in_row_ptr + item, in_row)
    budget = most
    if THRESHOLD:
        scores_row = scores_ptr + row * stride_row + head * stride_head
        above = pages_above(scores_row, in_row - 1, threshold, BLOCK)
        budget = tl.where(in_row > most, tl.minimum(most, above + 1), most)
    tl.store(budgets_ptr + item, budget)


@triton.jit(do_not_specialize=["width"])
def expand_kernel(
    pages_ptr,
    page_counts_ptr,
    slots_ptr,
    lens_ptr,
    set_ptr,
    counts_ptr,
    width,
    stride_slots,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Expand a block of one KV head's set of one row; `width` pages at most."""
    item = tl.program_id(0).to(tl.int64)
    row = item // HEADS
    length = tl.load(lens_ptr + row).to(tl.int32)
    count = tl.load(page_counts_ptr + item) * PAGE - (tl.cdiv(length, PAGE) * PAGE - length)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + item, count)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < count
    pages = tl.load(pages_ptr + item * width + columns // PAGE, mask=inside, other=0)
    slots = tl.load(slots_ptr + row * stride_slots + pages * PAGE + columns % PAGE, mask=inside, other=0)
    tl.store(set_ptr + item * width * PAGE + columns, slots, mask=columns < width * PAGE)


def choose_pages(
    scores: Tensor, seq_lens: Tensor, *, page: int, most: int, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """See `api.choose_pages`."""
    batch, heads, width = scores.shape
    operands = {
        "scores_ptr": scores,
        "lens_ptr": seq_lens,
        "most": most,
        "threshold": 0.0 if threshold is None else threshold,
        "stride_row": scores.stride(0),
        "stride_head": scores.stride(1),
        "HEADS": heads,
        "PAGE": page,
        "THRESHOLD": threshold is not None,
    }
    if width > MOST_HELD:
        in_row, budgets = (torch.empty(batch * heads, dtype=torch.int32, device=scores.device) for _ in range(2))
        count_above_kernel[(batch * heads,)](
            **operands, in_row_ptr=in_row, budgets_ptr=budgets, BLOCK=_BLOCK_SHARES, num_warps=4
        )
        sizes = SetSizes(budget=most, recent=1, sinks=0)
        rows = scores.flatten(0, 1)
        pages, counts = choose_in_spans(rows, in_row, sizes, slots=None, budgets=budgets, recents=None)
        return pages.unflatten(0, (batch, heads)), counts.unflatten(0, (batch, heads))
    pages = torch.empty(batch, heads, most, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=scores.device)
    block = max(64, triton.next_power_of_2(width))
    choose_pages_kernel[(batch * heads,)](
        **operands, pages_ptr=pages, counts_ptr=counts, BLOCK=block, num_warps=4 if block <= 2048 else 8
    )
    return pages, counts


def expand_pages(pages: Tensor, counts: Tensor, slots: Tensor, seq_lens: Tensor, *, page: int) -> tuple[Tensor, Tensor]:
    """See `api.expand_pages`."""
    batch, kv_heads, width = pages.shape
    expanded = torch.empty(batch, kv_heads, width * page, dtype=torch.int32, device=pages.device)
    tokens = torch.empty(batch, kv_heads, dtype=torch.int32, device=pages.device)
    # Rows by heads may be more than CUDA takes in any dimension but the first.
    expand_kernel[(batch * kv_heads, triton.cdiv(width * page, _BLOCK_SET))](
        pages_ptr=pages,
        page_counts_ptr=counts,
        slots_ptr=slots,
        lens_ptr=seq_lens,
        set_ptr=expanded,
        counts_ptr=tokens,
        width=width,
        stride_slots=slots.stride(0),
        HEADS=kv_heads,
        PAGE=page,
        BLOCK=_BLOCK_SET,
        num_warps=4,
    )
    return expanded, tokens
