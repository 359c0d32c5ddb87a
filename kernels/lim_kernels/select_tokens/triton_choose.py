"""Scores to a set in Triton: short passes over [B, L] scores, each spread over the whole context.

A histogram of binned scores finds the bin in which the m-th best candidate lies. Candidates above the bin are in; those
inside it are collected, and one warp finds exactly which of them are wanted, by score and then by position. The last
pass writes sinks, chosen candidates and window in ascending order. Binning is monotone, so what it can cost is time,
never exactness: where too many candidates share the bin, the row itself is searched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.select_tokens.triton_tiles import number_kept, tile, total
from lim_kernels.triton_support import readable_width

_BINS = 2048
_COPIES = 4
_FEW = 256  # candidates of the deciding bin that are listed, usually
_GATHERED = 2048  # and at most
_BLOCK = 2048


@triton.jit
def score_bin(scores, BINS: tl.constexpr):
    """Monotone bin of float32 scores, which are log-weights or places in (-84, 4): fine above -20, coarse below."""
    fine = BINS / 4 + (scores + 20.0) * (BINS / 32)
    coarse = (scores + 84.0) * (BINS / 256)
    return tl.minimum(tl.maximum(tl.where(scores > -20.0, fine, coarse), 0.0), BINS - 1.0).to(tl.int32)


@triton.jit
def order_key(scores, positions):
    """int64 that orders by score, then by lower position; above zero for every score, -inf included."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.to(tl.int64) + 0x80000000) << 22) + (0x3FFFFF - positions).to(tl.int64)


@triton.jit
def histogram_kernel(
    scores_ptr,
    lens_ptr,
    histogram_ptr,
    stride_scores,
    width,
    budget,
    recent,
    sinks,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a block's candidates by bin."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if (length <= budget) | (block * BLOCK >= length - recent):
        return
    positions = block * BLOCK + tl.arange(0, BLOCK)
    candidate = (positions >= sinks) & (positions < length - recent)
    scores = tl.load(scores_ptr + row * stride_scores + positions, mask=positions < width, other=0.0)
    bins = score_bin(scores, BINS)
    # Copies, so that tokens do not queue for one bin. The lowest bin's own count is never asked for.
    copies = (row * COPIES + positions % COPIES) * BINS
    tl.atomic_add(histogram_ptr + copies + bins, 1, mask=candidate & (bins > 0), sem="relaxed")


@triton.jit
def deciding_bin(histogram_ptr, middle, BINS: tl.constexpr, COPIES: tl.constexpr):
    """The bin that holds the middle-th best candidate, and how many of its candidates are wanted."""
    # Highest bin first.
    bins = BINS - 1 - tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    for copy in tl.static_range(1, COPIES):
        counts += tl.load(histogram_ptr + copy * BINS + bins)
    above = tl.cumsum(counts, axis=0) - counts
    found = tl.min(tl.where(above < middle, bins, BINS), axis=0)
    wanted = middle - tl.max(tl.where(above < middle, above, 0), axis=0)
    return found, tl.where(middle > 0, wanted, 0)


@triton.jit(do_not_specialize=["stride_sure"])
def collect_kernel(
    scores_ptr,
    lens_ptr,
    histogram_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    sure_ptr,
    stride_scores,
    stride_sure,
    width,
    budget,
    recent,
    sinks,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the candidates of the deciding bin, and count those above it, block by block."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if (length <= budget) | (block * BLOCK >= length):
        return
    found, wanted = deciding_bin(histogram_ptr + row * COPIES * BINS, budget - recent - sinks, BINS, COPIES)
    if block == 0:
        tl.store(decision_ptr + row * 2, found)
        tl.store(decision_ptr + row * 2 + 1, wanted)
    positions = block * BLOCK + tile(BLOCK)
    candidate = (positions >= sinks) & (positions < length - recent)
    scores = tl.load(scores_ptr + row * stride_scores + positions, mask=positions < width, other=0.0)
    bins = score_bin(scores, BINS)
    tl.store(sure_ptr + row * stride_sure + block, total(candidate & (bins > found)))
    undecided = candidate & (bins == found)
    count, places = number_kept(undecided)
    if count > 0:
        places += tl.atomic_add(num_gathered_ptr + row, count, sem="relaxed")
        keys = order_key(scores, positions)
        tl.store(gathered_ptr + row * GATHERED + places, keys, mask=undecided & (places < GATHERED))


@triton.jit
def nth_key(keys_ptr, count, wanted, SIZE: tl.constexpr):
    """A bound that `wanted` >= 1 of `count` distinct int64 keys reach."""
    ranks = tl.arange(0, SIZE)
    keys = tl.load(keys_ptr + ranks, mask=ranks < count, other=0)
    low = tl.min(tl.where(ranks < count, keys, 1 << 54), axis=0)
    high = tl.max(keys, axis=0) + 1
    # At least `wanted` keys are >= low, fewer are >= high.
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((keys >= middle).to(tl.int32), axis=0)
        if reached >= wanted:
            low = middle
        if reached <= wanted:
            high = tl.where(reached == wanted, middle + 1, middle)
    return low


@triton.jit
def count_before(keys_ptr, count, bound, start, SIZE: tl.constexpr):
    """How many of `count` keys reach `bound` at a position before `start`."""
    ranks = tl.arange(0, SIZE)
    keys = tl.load(keys_ptr + ranks, mask=ranks < count, other=0)
    earlier = (ranks < count) & (keys >= bound) & ((0x3FFFFF - (keys & 0x3FFFFF)) < start)
    return tl.sum(earlier.to(tl.int32), axis=0)


@triton.jit
def keys_in_bin(scores_row, width, start, first, last, found, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a block's candidates in bin `found`, zero for other tokens."""
    positions = start + tl.arange(0, BLOCK)
    inside = (positions >= first) & (positions < last)
    scores = tl.load(scores_row + positions, mask=positions < width, other=0.0)
    return tl.where(inside & (score_bin(scores, BINS) == found), order_key(scores, positions), 0)


@triton.jit
def nth_key_of_row(scores_row, width, first, last, found, wanted, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """`nth_key` of the row's candidates in bin `found`, read from the row itself."""
    low = tl.full([], 1 << 54, dtype=tl.int64)
    high = tl.full([], 0, dtype=tl.int64)
    for start in range(0, last, BLOCK):
        keys = keys_in_bin(scores_row, width, start, first, last, found, BINS, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(keys == 0, 1 << 54, keys), axis=0))
        high = tl.maximum(high, tl.max(keys, axis=0) + 1)
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = 0
        for start in range(0, last, BLOCK):
            keys = keys_in_bin(scores_row, width, start, first, last, found, BINS, BLOCK)
            reached += tl.sum((keys >= middle).to(tl.int32), axis=0)
        if reached >= wanted:
            low = middle
        if reached <= wanted:
            high = tl.where(reached == wanted, middle + 1, middle)
    return low


@triton.jit
def decide_kernel(
    lens_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    bound_ptr,
    budget,
    FEW: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """The key that a candidate of the deciding bin must reach. One warp a row: bisection waits for no other."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
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
    lens_ptr,
    gathered_ptr,
    num_gathered_ptr,
    decision_ptr,
    bound_ptr,
    sure_ptr,
    slots_ptr,
    set_ptr,
    counts_ptr,
    stride_scores,
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
    BLOCK_SURE: tl.constexpr,
    TO_SLOTS: tl.constexpr,
):
    """Write a block's share of the set, in order; a row within the budget keeps everything."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    count = tl.minimum(length, budget)
    start = block * BLOCK
    positions = start + tile(BLOCK)
    if block == 0:
        tl.store(counts_ptr + row, count)
    set_row = set_ptr + row * stride_set
    # What lies after the set, as far as this block covers the width of the set.
    unused = 0 if TO_SLOTS else -1
    tl.store(set_row + positions, unused, mask=(positions >= count) & (positions < set_width))
    if start >= length:
        return
    if length <= budget:
        kept = positions < length
        places = positions
    else:
        first = sinks
        last = length - recent
        found = tl.load(decision_ptr + row * 2)
        gathered = tl.load(num_gathered_ptr + row)
        keys = gathered_ptr + row * GATHERED
        scores_row = scores_ptr + row * stride_scores
        if gathered <= GATHERED:
            bound = tl.load(bound_ptr + row)
        else:
            wanted = tl.load(decision_ptr + row * 2 + 1)
            bound = nth_key_of_row(scores_row, width, first, last, found, wanted, BINS, BLOCK)
        candidate = (positions >= first) & (positions < last)
        scores = tl.load(scores_row + positions, mask=positions < width, other=0.0)
        bins = score_bin(scores, BINS)
        decided = (bins == found) & (order_key(scores, positions) >= bound)
        forced = (positions < first) | ((positions >= last) & (positions < length))
        kept = forced | (candidate & ((bins > found) | decided))

        blocks = tl.arange(0, BLOCK_SURE)
        before = tl.sum(tl.load(sure_ptr + row * stride_sure + blocks, mask=blocks < block, other=0), axis=0)
        if gathered <= FEW:
            before += count_before(keys, gathered, bound, start, FEW)
        elif gathered <= GATHERED:
            before += count_before(keys, gathered, bound, start, GATHERED)
        else:
            for other in range(0, start, BLOCK):
                theirs = keys_in_bin(scores_row, width, other, first, last, found, BINS, BLOCK)
                before += tl.sum((theirs >= bound).to(tl.int32), axis=0)
        before += tl.minimum(start, first) + tl.maximum(start - last, 0)
        _, places = number_kept(kept)
        places += before
    values = tl.load(slots_ptr + row * stride_slots + positions, mask=kept, other=0) if TO_SLOTS else positions
    tl.store(set_row + places, values, mask=kept)


def choose_tokens(
    scores: Tensor, seq_lens: Tensor, *, budget: int, recent: int, sinks: int, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `api.choose_tokens`."""
    batch, length = scores.shape
    device = scores.device
    blocks = triton.cdiv(max(length, budget if length < budget else 1), _BLOCK)
    chosen = torch.empty(batch, budget, dtype=torch.int32, device=device)
    counts = torch.empty(batch, dtype=torch.int32, device=device)
    # One allocation, so that one fill clears both.
    zeroed = torch.zeros(batch * (_COPIES * _BINS + 1), dtype=torch.int32, device=device)
    histogram, num_gathered = zeroed[batch:], zeroed[:batch]
    gathered = torch.empty(batch, _GATHERED, dtype=torch.int64, device=device)
    decision = torch.empty(batch, 2, dtype=torch.int32, device=device)
    bound = torch.empty(batch, dtype=torch.int64, device=device)
    sure = torch.empty(batch, blocks, dtype=torch.int32, device=device)
    sizes = {
        "width": readable_width(scores),
        "budget": budget,
        "recent": recent,
        "sinks": sinks,
        "BINS": _BINS,
        "BLOCK": _BLOCK,
    }
    if length > budget:
        histogram_kernel[(blocks, batch)](
            scores_ptr=scores,
            lens_ptr=seq_lens,
            histogram_ptr=histogram,
            stride_scores=scores.stride(0),
            COPIES=_COPIES,
            num_warps=8,
            **sizes,
        )
        collect_kernel[(blocks, batch)](
            scores_ptr=scores,
            lens_ptr=seq_lens,
            histogram_ptr=histogram,
            gathered_ptr=gathered,
            num_gathered_ptr=num_gathered,
            decision_ptr=decision,
            sure_ptr=sure,
            stride_scores=scores.stride(0),
            stride_sure=sure.stride(0),
            COPIES=_COPIES,
            GATHERED=_GATHERED,
            num_warps=8,
            **sizes,
        )
        decide_kernel[(batch,)](
            lens_ptr=seq_lens,
            gathered_ptr=gathered,
            num_gathered_ptr=num_gathered,
            decision_ptr=decision,
            bound_ptr=bound,
            budget=budget,
            FEW=_FEW,
            GATHERED=_GATHERED,
            num_warps=1,
        )
    emit_kernel[(blocks, batch)](
        scores_ptr=scores,
        lens_ptr=seq_lens,
        gathered_ptr=gathered,
        num_gathered_ptr=num_gathered,
        decision_ptr=decision,
        bound_ptr=bound,
        sure_ptr=sure,
        slots_ptr=slots,
        set_ptr=chosen,
        counts_ptr=counts,
        stride_scores=scores.stride(0),
        stride_sure=sure.stride(0),
        stride_slots=0 if slots is None else slots.stride(0),
        stride_set=chosen.stride(0),
        set_width=budget,
        FEW=_FEW,
        GATHERED=_GATHERED,
        BLOCK_SURE=max(64, triton.next_power_of_2(blocks)),
        TO_SLOTS=slots is not None,
        num_warps=8,
        **sizes,
    )
    return chosen, counts
