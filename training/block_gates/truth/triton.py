"""Largest attention weights of blocks in Triton, without logits in memory.

One kernel makes the log-sum-exp of each query and query head: a program a tile of queries and head, over all keys up to
them. The other one makes the logits anew: a program a tile of keys, tile of queries and KV head takes the head's query
heads in turn. Logarithms are base 2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.dispatch import require
from lim_kernels.triton_support import interpreting

_LOG2_E = 1.4426950408889634
_PRECISION = tl.constexpr("tf32x3")
"""Of products of float32: as exact as float32, and on tensor cores."""
_KEY_TILE_BYTES = 1 << 14


@dataclass(frozen=True)
class Tile:
    """Queries and keys whose logits a program has at once, as powers of two, and its warps."""

    queries: int
    keys: int
    warps: int


@triton.jit
def load_vectors(rows_ptr, places, there, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Vectors [N, BLOCK_DIM] at places [N] of one head of one row, 0 where not `there` [N]."""
    dims = tl.arange(0, BLOCK_DIM)
    vectors = tl.load(
        rows_ptr + places.to(tl.int64)[:, None] * stride + dims[None, :],
        mask=there[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        vectors = vectors.to(tl.float32)
    return vectors


@triton.jit
def add_keys(
    q,
    positions,
    k_ptr,
    stride_k,
    begin,
    end,
    scale,
    peak,
    norm,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add keys `begin` … `end` - 1 to the largest logit and the sum of weights relative to it of queries [QUERIES].

    CAUSAL: some of these keys come later than some of the queries, which are at `positions`.
    """
    for start in range(begin, end, KEYS):
        places = start + tl.arange(0, KEYS)
        k = load_vectors(k_ptr, places, places < end, stride_k, DIM, BLOCK_DIM, UPCAST)
        # [QUERIES, KEYS]
        logits = tl.dot(q, tl.trans(k), input_precision=_PRECISION) * scale
        if CAUSAL:
            logits = tl.where(places[None, :] <= positions[:, None], logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        norm = norm * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(logits - new_peak[:, None]), axis=1)
        peak = new_peak
    return peak, norm


@triton.jit(do_not_specialize=["count", "first"])
def log_sums_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    count,
    first,
    scale,
    stride_q_row,
    stride_q_head,
    stride_q,
    stride_k_row,
    stride_k_head,
    stride_k,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The log-sum-exp of a tile of one query head's queries, which are at positions `first` … `first` + count - 1."""
    # The last queries have most keys: they begin first.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    queries = begin + tl.arange(0, QUERIES)
    there = queries < count
    # [QUERIES, BLOCK_DIM]
    q = load_vectors(
        q_ptr + row * stride_q_row + head * stride_q_head, queries, there, stride_q, DIM, BLOCK_DIM, UPCAST
    )
    k_ptr += row * stride_k_row + (head // GROUP) * stride_k_head
    positions = first + queries
    peak = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    norm = tl.zeros([QUERIES], dtype=tl.float32)
    # Whole tiles of keys that no query of this tile precedes, and the rest, in which each query has a key of its own.
    whole = (first + begin) // KEYS * KEYS
    end = first + tl.minimum(begin + QUERIES, count)
    peak, norm = add_keys(
        q, positions, k_ptr, stride_k, 0, whole, scale, peak, norm, DIM, BLOCK_DIM, KEYS, False, UPCAST
    )
    peak, norm = add_keys(
        q, positions, k_ptr, stride_k, whole, end, scale, peak, norm, DIM, BLOCK_DIM, KEYS, True, UPCAST
    )
    lse = lse_ptr + (row * tl.num_programs(1) + head) * count + queries
    tl.store(lse, peak + tl.log2(norm), mask=there)


@triton.jit(do_not_specialize=["count", "first"])
def largest_weights_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    weights_ptr,
    count,
    first,
    blocks,
    scale,
    stride_q_row,
    stride_q_head,
    stride_q,
    stride_k_row,
    stride_k_head,
    stride_k,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The largest weights that a tile of queries of one KV head gives to the blocks of a tile of keys.

    Blocks that are not complete before a query's own are not written.
    """
    BLOCKS: tl.constexpr = KEYS // BLOCK
    tile = tl.program_id(0)
    begin = tl.program_id(1) * QUERIES
    head = (tl.program_id(2) % HEADS).to(tl.int64)
    row = (tl.program_id(2) // HEADS).to(tl.int64)
    last = first + tl.minimum(begin + QUERIES, count) - 1
    if tile * BLOCKS >= last // BLOCK:
        return
    queries = begin + tl.arange(0, QUERIES)
    there = queries < count
    places = tile * KEYS + tl.arange(0, KEYS)
    # [KEYS, BLOCK_DIM]
    k = load_vectors(
        k_ptr + row * stride_k_row + head * stride_k_head, places, places < last, stride_k, DIM, BLOCK_DIM, UPCAST
    )
    best = tl.zeros([QUERIES, BLOCKS], dtype=tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        q = load_vectors(
            q_ptr + row * stride_q_row + query_head * stride_q_head, queries, there, stride_q, DIM, BLOCK_DIM, UPCAST
        )
        lse = tl.load(lse_ptr + (row * HEADS * GROUP + query_head) * count + queries, mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=_PRECISION)
        # [QUERIES, BLOCKS]
        largest = tl.max(tl.reshape(logits, [QUERIES, BLOCKS, BLOCK]), axis=2) * scale
        best = tl.maximum(best, tl.exp2(largest - lse[:, None]))
    own = (first + queries) // BLOCK
    columns = tile * BLOCKS + tl.arange(0, BLOCKS)
    out = (((row * HEADS + head) * count + queries) * blocks)[:, None] + columns[None, :]
    tl.store(weights_ptr + out, best, mask=there[:, None] & (columns[None, :] < own[:, None]))


def largest_weights(q: Tensor, k: Tensor, first: int, *, scale: float, block: int) -> Tensor:
    """See `reference.largest_weights`; without a bound on memory, for there are no logits."""
    fits = block >= 16 and block & (block - 1) == 0
    require(fits, "block_truth", 'a block of a power of two, 16 or more, or implementation="reference"', block)
    batch, heads, count, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    weights = torch.zeros(batch, kv_heads, count, length // block, dtype=torch.float32, device=q.device)
    if not weights.numel():
        return weights
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    block_dim = max(16, triton.next_power_of_2(dim))
    # More would not fit into the shared memory of most GPUs.
    narrow = block_dim * (2 if q.dtype == torch.float32 else 1) <= 256
    require(
        narrow, "block_truth", "heads of 128 at most in float32 and 256 in 16 bits (--dtype bfloat16)", (dim, q.dtype)
    )
    tile = tile_of(q.dtype, block_dim)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "lse_ptr": lse,
        "count": count,
        "first": first,
        "scale": scale * _LOG2_E,
        "stride_q_row": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_q": q.stride(2),
        "stride_k_row": k.stride(0),
        "stride_k_head": k.stride(1),
        "stride_k": k.stride(2),
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "BLOCK_DIM": block_dim,
        "QUERIES": tile.queries,
        "UPCAST": interpreting(),
        "num_warps": tile.warps,
    }
    tiles = triton.cdiv(count, tile.queries)
    log_sums_kernel[(tiles, heads, batch)](**shared, KEYS=tile.keys, num_stages=3)
    # A tile of keys has whole blocks. The last key is in its query's own block.
    keys = max(block, tile.keys)
    largest_weights_kernel[(triton.cdiv(first + count - 1, keys), tiles, batch * kv_heads)](
        **shared, weights_ptr=weights, blocks=length // block, HEADS=kv_heads, BLOCK=block, KEYS=keys, num_stages=2
    )
    return weights


def tile_of(dtype: torch.dtype, block_dim: int) -> Tile:
    """How queries and keys of this type and width are tiled."""
    # A float32 is multiplied as three products of its two halves, which take as much shared memory again.
    width = block_dim * (8 if dtype == torch.float32 else 2)
    keys = max(16, min(128, _KEY_TILE_BYTES // width))
    return Tile(queries=128, keys=keys, warps=8) if width <= 256 else Tile(queries=64, keys=keys, warps=4)
