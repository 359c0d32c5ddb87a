"""Blocks of tokens as tiles of 16 in a row, in which kept tokens are numbered with few exchanges between threads."""

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
