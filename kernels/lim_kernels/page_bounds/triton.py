"""Page bounds in Triton: a program a written slot and KV head, of which the last of each page's run has work to do;
one a block of pages, KV head and row scores.
"""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.page_bounds import state
from lim_kernels.page_bounds.state import PageBounds
from lim_kernels.triton_support import interpreting, padded_empty, programs_along

_PAGE = tl.constexpr(state.PAGE)
_BLOCK_PAGES = 64


@triton.jit(do_not_specialize=["num_written"])
def bound_kernel(
    k_ptr,
    written_ptr,
    lows_ptr,
    highs_ptr,
    num_written,
    stride_slot,
    stride_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Bound one KV head's keys of a page, up to the last slot that was written of it."""
    item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(written_ptr + item).to(tl.int64)
    following = tl.load(written_ptr + item + 1, mask=item + 1 < num_written, other=-1).to(tl.int64)
    offset = slot % _PAGE
    if (following == slot + 1) & (offset < _PAGE - 1):
        return
    page = slot // _PAGE
    offsets = tl.arange(0, _PAGE)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    # [PAGE, BLOCK_DIM]
    keys = tl.load(
        k_ptr + (page * _PAGE + offsets)[:, None] * stride_slot + head * stride_head + dims[None, :],
        mask=(offsets <= offset)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    there = (offsets <= offset)[:, None]
    out = (page * HEADS + head) * DIM + dims
    low = tl.min(tl.where(there, keys, float("inf")), axis=0)
    high = tl.max(tl.where(there, keys, -float("inf")), axis=0)
    tl.store(lows_ptr + out, low.to(lows_ptr.dtype.element_ty), mask=inside)
    tl.store(highs_ptr + out, high.to(highs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_bounds(bounds_ptr, pages, there, head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """One KV head's lows or highs of pages [BLOCK], where `there`: [BLOCK, BLOCK_DIM]."""
    dims = tl.arange(0, BLOCK_DIM)
    places = (pages[:, None] * HEADS + head) * DIM + dims[None, :]
    return tl.load(bounds_ptr + places, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["score_beyond"])
def score_pages_kernel(
    q_ptr,
    lows_ptr,
    highs_ptr,
    slots_ptr,
    lens_ptr,
    scores_ptr,
    score_beyond,
    stride_q_row,
    stride_q_head,
    stride_slots,
    stride_scores_row,
    stride_scores_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Score one row's pages for one KV head, block by block."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    count = tl.cdiv(length, _PAGE)
    if (length <= score_beyond) | (tl.program_id(0) * BLOCK >= count):
        return
    group = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    # [BLOCK_GROUP, BLOCK_DIM]
    q = tl.load(
        q_ptr + row * stride_q_row + (head * GROUP + group)[:, None] * stride_q_head + dims[None, :],
        mask=(group < GROUP)[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    zero = tl.zeros_like(q)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        there = places < count
        pages = tl.load(slots_ptr + row * stride_slots + places * _PAGE, mask=there, other=0).to(tl.int64) // _PAGE
        lows = load_bounds(lows_ptr, pages, there, head, HEADS, DIM, BLOCK_DIM).to(q.dtype)
        highs = load_bounds(highs_ptr, pages, there, head, HEADS, DIM, BLOCK_DIM).to(q.dtype)
        # [BLOCK_GROUP, BLOCK]
        scores = tl.dot(tl.where(q > 0, q, zero), tl.trans(highs), input_precision="ieee")
        scores = tl.dot(tl.where(q < 0, q, zero), tl.trans(lows), scores, input_precision="ieee")
        best = tl.max(tl.where((group < GROUP)[:, None], scores, -float("inf")), axis=0)
        tl.store(scores_ptr + row * stride_scores_row + head * stride_scores_head + places, best, mask=there)


def bound_pages(bounds: PageBounds, k_cache: Tensor, written: Tensor) -> None:
    """See `api.bound_pages`."""
    _, kv_heads, dim = bounds.lows.shape
    if not len(written):
        return
    bound_kernel[(len(written), kv_heads)](
        k_ptr=k_cache,
        written_ptr=written,
        lows_ptr=bounds.lows,
        highs_ptr=bounds.highs,
        num_written=len(written),
        stride_slot=k_cache.stride(0),
        stride_head=k_cache.stride(1),
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_DIM=triton.next_power_of_2(dim),
        num_warps=2,
    )


def score_pages(q: Tensor, bounds: PageBounds, slots: Tensor, seq_lens: Tensor, *, score_beyond: int) -> Tensor:
    """See `api.score_pages`."""
    batch, heads, dim = q.shape
    kv_heads = bounds.lows.shape[1]
    pages = triton.cdiv(slots.shape[1], state.PAGE)
    scores = padded_empty(batch, kv_heads, pages, device=q.device)
    programs = programs_along(triton.cdiv(pages, _BLOCK_PAGES), kv_heads * batch, q.device)
    score_pages_kernel[(programs, kv_heads, batch)](
        q_ptr=q,
        lows_ptr=bounds.lows,
        highs_ptr=bounds.highs,
        slots_ptr=slots,
        lens_ptr=seq_lens,
        scores_ptr=scores,
        score_beyond=score_beyond,
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_slots=slots.stride(0),
        stride_scores_row=scores.stride(0),
        stride_scores_head=scores.stride(1),
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK=_BLOCK_PAGES,
        BLOCK_GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_DIM=triton.next_power_of_2(dim),
        UPCAST=interpreting(),
        num_warps=4,
        # Most rows have one block a program: nothing is loaded ahead.
        num_stages=1,
    )
    return scores
