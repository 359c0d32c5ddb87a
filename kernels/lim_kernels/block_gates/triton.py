"""Block gates in Triton: a program a written slot and KV head, of which a block's last has work to do; one a tile of
rows, KV head and columns projects queries; one a tile of blocks, KV head and row normalises, rotates and scores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.block_gates import state
from lim_kernels.block_gates.state import GatedBlocks
from lim_kernels.triton_support import interpreting, padded_empty

_EPSILON = tl.constexpr(state.EPSILON)
_KINDS = {name: kind for kind, name in enumerate(state.POOLS)}
_TILE_BLOCKS = 64
_TILE_ROWS = 16
_TILE_COLUMNS = 32


@triton.jit
def load_bare(
    rows_ptr, positions, there, dims, table_ptr, DIM: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Vectors [N, BLOCK_DIM] behind pointers [N, 1], where `there` [N], with their rotation at positions [N] undone."""
    HALF: tl.constexpr = TURNED // 2
    if INTERLEAVED:
        first = dims % 2 == 0
        partner = dims ^ 1
        frequency = dims // 2
    else:
        first = dims < HALF
        partner = tl.where(first, dims + HALF, dims - HALF)
        frequency = tl.where(first, dims, dims - HALF)
    turned = there[:, None] & (dims < TURNED)[None, :]
    own = tl.load(rows_ptr + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)
    other = tl.load(rows_ptr + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    angles = table_ptr + positions.to(tl.int64)[:, None] * TURNED + frequency[None, :]
    cos = tl.load(angles, mask=turned, other=1.0)
    sin = tl.load(angles + HALF, mask=turned, other=0.0)
    return (own * cos + tl.where(first[None, :], other, -other) * sin) / (cos * cos + sin * sin)


@triton.jit
def normed(one, two, norm_ptr, columns, HALF: tl.constexpr, NORM: tl.constexpr):
    """Both halves of a vector, normalised if there is a norm."""
    if NORM:
        scale = tl.rsqrt((tl.sum(one * one, axis=0) + tl.sum(two * two, axis=0)) / (2 * HALF) + _EPSILON)
        one = one * scale * tl.load(norm_ptr + columns).to(tl.float32)
        two = two * scale * tl.load(norm_ptr + HALF + columns).to(tl.float32)
    return one, two


@triton.jit
def rotated(one, two, table_ptr, position, columns, HALF: tl.constexpr, ROTATE: tl.constexpr):
    """Both halves of a vector, rotated as of a position if they are rotated at all."""
    if ROTATE:
        angles = table_ptr + position.to(tl.int64) * 2 * HALF + columns
        cos = tl.load(angles)
        sin = tl.load(angles + HALF)
        one, two = one * cos - two * sin, two * cos + one * sin
    return one, two


@triton.jit
def pooled(keys, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One of keys [BLOCK, BLOCK_DIM], by the place of its name among `POOLS`."""
    if KIND == 0:
        result = tl.max(keys, axis=0)
    elif KIND == 1:
        result = tl.min(keys, axis=0)
    else:
        result = tl.sum(keys, axis=0) / BLOCK
    return result


@triton.jit
def gate_keys_kernel(
    k_ptr,
    written_ptr,
    positions_ptr,
    table_ptr,
    weights_ptr,
    norm_ptr,
    gate_table_ptr,
    keys_ptr,
    k_scale,
    stride_slot,
    stride_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    THIRD_KIND: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Make one KV head's gate key of the block whose last slot this is; kinds of pools are -1 behind the last one."""
    item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(written_ptr + item).to(tl.int64)
    if slot % BLOCK != BLOCK - 1:
        return
    first = tl.load(positions_ptr + item).to(tl.int64) - (BLOCK - 1)
    places = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    rows = k_ptr + (slot - (BLOCK - 1) + places)[:, None] * stride_slot + head * stride_head
    # [BLOCK, BLOCK_DIM]
    keys = load_bare(rows, first + places, places < BLOCK, dims, table_ptr, DIM, TURNED, INTERLEAVED) * k_scale
    columns = tl.arange(0, HALF)
    COUNT: tl.constexpr = 1 + (SECOND_KIND >= 0) + (THIRD_KIND >= 0)
    weights = weights_ptr + head * COUNT * DIM * 2 * HALF + dims[:, None] * 2 * HALF + columns[None, :]
    one = tl.zeros([HALF], dtype=tl.float32)
    two = tl.zeros([HALF], dtype=tl.float32)
    for n in tl.static_range(COUNT):
        pool = pooled(keys, FIRST_KIND if n == 0 else (SECOND_KIND if n == 1 else THIRD_KIND), BLOCK)[:, None]
        of_pool = weights + n * DIM * 2 * HALF
        one += tl.sum(pool * tl.load(of_pool, mask=inside[:, None], other=0.0).to(tl.float32), axis=0)
        two += tl.sum(pool * tl.load(of_pool + HALF, mask=inside[:, None], other=0.0).to(tl.float32), axis=0)
    one, two = normed(one, two, norm_ptr, columns, HALF, NORM)
    one, two = rotated(one, two, gate_table_ptr, first, columns, HALF, ROTATE)
    out = keys_ptr + ((slot // BLOCK) * HEADS + head) * 2 * HALF + columns
    tl.store(out, one.to(keys_ptr.dtype.element_ty))
    tl.store(out + HALF, two.to(keys_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["batch"])
def project_queries_kernel(
    q_ptr,
    lens_ptr,
    table_ptr,
    weights_ptr,
    queries_ptr,
    batch,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project a tile of rows' queries of one KV head to a tile of the gate's columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = rows < batch
    positions = tl.maximum(tl.load(lens_ptr + rows, mask=there, other=1).to(tl.int32) - 1, 0)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    rows_ptr = q_ptr + rows.to(tl.int64)[:, None] * stride_row
    result = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        # [ROWS, BLOCK_DIM] and [BLOCK_DIM, COLUMNS]
        q = load_bare(rows_ptr + query_head * stride_head, positions, there, dims, table_ptr, DIM, TURNED, INTERLEAVED)
        weights = tl.load(
            weights_ptr + (query_head * DIM + dims)[:, None] * WIDTH + columns[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        if UPCAST:
            weights = weights.to(tl.float32)
        result = tl.dot(q.to(weights.dtype), weights, result, input_precision="ieee")
    out = (rows.to(tl.int64)[:, None] * HEADS + head) * WIDTH + columns[None, :]
    tl.store(queries_ptr + out, result, mask=there[:, None])


@triton.jit(do_not_specialize=["score_beyond"])
def score_blocks_kernel(
    queries_ptr,
    keys_ptr,
    norm_ptr,
    gate_table_ptr,
    slots_ptr,
    lens_ptr,
    scores_ptr,
    scale,
    score_beyond,
    stride_slots,
    stride_scores_row,
    stride_scores_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Score a tile of one row's blocks for one KV head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    # The last block is chosen whatever it scores.
    count = tl.cdiv(length, BLOCK) - 1
    start = tl.program_id(0) * TILE
    if (length <= score_beyond) | (start >= count):
        return
    places = start + tl.arange(0, TILE)
    there = places < count
    slots = tl.load(slots_ptr + row * stride_slots + places * BLOCK, mask=there, other=0).to(tl.int64)
    columns = tl.arange(0, HALF)
    query = queries_ptr + (row * HEADS + head) * 2 * HALF + columns
    one, two = normed(tl.load(query), tl.load(query + HALF), norm_ptr, columns, HALF, NORM)
    one, two = rotated(one, two, gate_table_ptr, length - 1, columns, HALF, ROTATE)
    # [TILE, HALF]
    keys = keys_ptr + ((slots // BLOCK) * HEADS + head)[:, None] * 2 * HALF + columns[None, :]
    first = tl.load(keys, mask=there[:, None], other=0.0).to(tl.float32)
    second = tl.load(keys + HALF, mask=there[:, None], other=0.0).to(tl.float32)
    scores = tl.sum(first * one[None, :] + second * two[None, :], axis=1) * scale
    tl.store(scores_ptr + row * stride_scores_row + head * stride_scores_head + places, scores, mask=there)


def gate_keys(blocks: GatedBlocks, k_cache: Tensor, written: Tensor, positions: Tensor, *, k_scale: float) -> None:
    """See `api.gate_keys`."""
    gate, table = blocks.gate, blocks.rotation.table
    kv_heads, dim = k_cache.shape[1:]
    if not len(written):
        return
    kinds = [_KINDS[name] for name in gate.pools] + [-1] * (3 - len(gate.pools))
    gate_keys_kernel[(len(written), kv_heads)](
        k_ptr=k_cache,
        written_ptr=written,
        positions_ptr=positions,
        table_ptr=table,
        weights_ptr=gate.key,
        norm_ptr=gate.key_norm,
        gate_table_ptr=None if gate.rotation is None else gate.rotation.table,
        keys_ptr=blocks.keys,
        k_scale=k_scale,
        stride_slot=k_cache.stride(0),
        stride_head=k_cache.stride(1),
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_DIM=triton.next_power_of_2(dim),
        HALF=gate.width // 2,
        BLOCK=blocks.block,
        FIRST_KIND=kinds[0],
        SECOND_KIND=kinds[1],
        THIRD_KIND=kinds[2],
        TURNED=table.shape[1],
        INTERLEAVED=blocks.rotation.interleaved,
        NORM=gate.key_norm is not None,
        ROTATE=gate.rotation is not None,
        num_warps=8,
    )


def score_blocks(q: Tensor, blocks: GatedBlocks, slots: Tensor, seq_lens: Tensor, *, score_beyond: int) -> Tensor:
    """See `api.score_blocks`."""
    gate = blocks.gate
    batch, kv_heads, places = len(q), len(gate.query), triton.cdiv(slots.shape[1], blocks.block)
    queries = _project_queries(q, blocks, seq_lens)
    scores = padded_empty(batch, kv_heads, places, device=q.device)
    score_blocks_kernel[(triton.cdiv(places, _TILE_BLOCKS), kv_heads, batch)](
        queries_ptr=queries,
        keys_ptr=blocks.keys,
        norm_ptr=gate.query_norm,
        gate_table_ptr=None if gate.rotation is None else gate.rotation.table,
        slots_ptr=slots,
        lens_ptr=seq_lens,
        scores_ptr=scores,
        scale=gate.width**-0.5,
        score_beyond=score_beyond,
        stride_slots=slots.stride(0),
        stride_scores_row=scores.stride(0),
        stride_scores_head=scores.stride(1),
        HEADS=kv_heads,
        HALF=gate.width // 2,
        BLOCK=blocks.block,
        TILE=_TILE_BLOCKS,
        NORM=gate.query_norm is not None,
        ROTATE=gate.rotation is not None,
        num_warps=4,
    )
    return scores


def _project_queries(q: Tensor, blocks: GatedBlocks, seq_lens: Tensor) -> Tensor:
    """The gate's queries float32 [B, H_kv, d] before norm and rotation."""
    gate, table = blocks.gate, blocks.rotation.table
    batch, heads, dim = q.shape
    kv_heads, columns = len(gate.query), min(_TILE_COLUMNS, gate.width)
    queries = torch.empty(batch, kv_heads, gate.width, dtype=torch.float32, device=q.device)
    project_queries_kernel[(triton.cdiv(batch, _TILE_ROWS), kv_heads, gate.width // columns)](
        q_ptr=q,
        lens_ptr=seq_lens,
        table_ptr=table,
        weights_ptr=gate.query,
        queries_ptr=queries,
        batch=batch,
        stride_row=q.stride(0),
        stride_head=q.stride(1),
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
        WIDTH=gate.width,
        ROWS=_TILE_ROWS,
        COLUMNS=columns,
        TURNED=table.shape[1],
        INTERLEAVED=blocks.rotation.interleaved,
        UPCAST=interpreting() or gate.query.dtype == torch.float64,
        num_warps=4,
    )
    return queries
