"""What passes over scored tokens are made of: tiles in which kept tokens are numbered, bins of scores, and keys.

A tile has 16 tokens in a row, so that numbering them takes few exchanges between threads.
"""

import triton
import triton.language as tl


@triton.jit
def tile(BLOCK: tl.constexpr):
    """0 … BLOCK-1 as [BLOCK / 16, 16]."""
    return tl.arange(0, BLOCK // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def number_kept(kept):
    """How many tokens of a tile are kept, and for each of them how many kept ones come before it."""
    counts = kept.to(tl.int32)
    rows = tl.sum(counts, axis=1)
    before = tl.cumsum(rows, axis=0) - rows
    return tl.sum(rows, axis=0), before[:, None] + tl.cumsum(counts, axis=1) - 1


@triton.jit
def total(mask):
    """How many tokens of a tile are in `mask`."""
    return tl.sum(tl.sum(mask.to(tl.int32), axis=1), axis=0)


@triton.jit
def sum_between(counts_ptr, begin, end):
    """Sum of the int32 counts of places begin … end - 1."""
    sums = tl.zeros([64], dtype=tl.int32)
    for start in range(begin, end, 64):
        places = start + tl.arange(0, 64)
        sums += tl.load(counts_ptr + places, mask=places < end, other=0)
    return tl.sum(sums, axis=0)


@triton.jit
def score_bin(scores, BINS: tl.constexpr):
    """Monotone bin of float32 scores, which are log-weights or places in (-84, 4): fine above -20, coarse below."""
    fine = BINS / 4 + (scores + 20.0) * (BINS / 32)
    coarse = (scores + 84.0) * (BINS / 256)
    return tl.minimum(tl.maximum(tl.where(scores > -20.0, fine, coarse), 0.0), BINS - 1.0).to(tl.int32)


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


@triton.jit
def order_key(scores, positions):
    """int64 that orders by score, then by lower position; above zero for every score, -inf included."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((ordered.to(tl.int64) + 0x80000000) << 22) + (0x3FFFFF - positions).to(tl.int64)


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
