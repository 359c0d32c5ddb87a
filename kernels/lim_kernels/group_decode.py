"""Decode attention by prefix groups in Triton: one kernel for what groups share, one for what rows hold alone, one that
merges. Grouped decode and scoring by groups share them.

In the first, the query heads that read one KV head, of up to 16 rows and more, are the queries of a tensor-core tile,
so that a shared chunk's keys and values are read once for them. The second is `split_decode`'s, from each row's own
part on. Both are launched for every batch: which groups there are is known on the device alone, and where there are
none the first ends at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.decode_parts import (
    attend_chunk,
    chunk_size,
    even_size,
    locate,
    merge_parts,
    merge_row,
    pick,
    plan,
    store_merged,
    store_part,
)
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import MAX_LEVELS, PrefixGroups
from lim_kernels.split_decode import Launch, attended, empty_results, split
from lim_kernels.triton_support import multiprocessors, plan_block


@dataclass(frozen=True)
class Tile:
    """How the kernel of the shared parts runs."""

    queries: int
    """Query heads that a program holds: of so many rows as fit."""
    block: int
    """Slots an iteration."""
    warps: int
    stages: int
    waves: int
    """Most waves of chunks, beside one chunk for every tile of every group."""
    chunk: int
    """Preferred slots a chunk."""


@triton.jit
def plan_groups(
    counts_ptr,
    starts_ptr,
    ends_ptr,
    batch,
    fewest_items,
    most_items,
    preferred,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Of each group: its positions, into how many tiles its rows and into how many chunks its positions are cut."""
    groups = tl.arange(0, BLOCK_ROWS)
    there = groups < batch
    counts = tl.load(counts_ptr + groups, mask=there, other=0)
    lens = tl.load(ends_ptr + groups, mask=there, other=0) - tl.load(starts_ptr + groups, mask=there, other=0)
    lens = tl.where(counts > 0, lens, 0)
    tiles = tl.cdiv(counts, TILE_ROWS)
    size = chunk_size(tl.sum(lens * tiles, axis=0), fewest_items, most_items, preferred, BLOCK)
    return lens, tiles, tl.cdiv(lens, size)


@triton.jit(do_not_specialize=["batch", "score_beyond", "fewest_items", "most_items", "preferred"])
def group_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    lens_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    members_ptr,
    partial_ptr,
    partial_lse_ptr,
    logits_ptr,
    batch,
    scale,
    logit_cap,
    v_scale,
    score_beyond,
    fewest_items,
    most_items,
    preferred,
    stride_q_row,
    stride_q_head,
    stride_k_slot,
    stride_k_head,
    stride_v_slot,
    stride_v_head,
    stride_slots_row,
    stride_logits_row,
    stride_logits_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one KV head's query heads of a tile of a group's rows over one chunk of the group's positions."""
    kv_head = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1)
    lens, tiles, chunks = plan_groups(
        counts_ptr, starts_ptr, ends_ptr, batch, fewest_items, most_items, preferred, TILE_ROWS, BLOCK, BLOCK_ROWS
    )
    group, index = locate(tiles * chunks, item, BLOCK_ROWS)
    if group >= batch:
        return
    # Tiles of one chunk follow one another, so that all but the first find it in L2.
    num_tiles = pick(tiles, group, BLOCK_ROWS)
    size = even_size(pick(lens, group, BLOCK_ROWS), pick(chunks, group, BLOCK_ROWS), BLOCK)
    begin = tl.load(starts_ptr + group) + (index // num_tiles) * size
    end = tl.minimum(begin + size, tl.load(ends_ptr + group))

    queries = tl.arange(0, TILE_ROWS * BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    places = (index % num_tiles) * TILE_ROWS + queries // BLOCK_GROUP
    in_group = queries % BLOCK_GROUP
    there = (in_group < GROUP) & (places < tl.load(counts_ptr + group))
    heads = kv_head * GROUP + in_group
    members = members_ptr + group.to(tl.int64) * batch
    rows = tl.load(members + places, mask=there, other=0).to(tl.int64)
    if DIM_V == 0:
        # Without values a tile is read for logits alone.
        longest = tl.max(tl.load(lens_ptr + rows, mask=there, other=0), axis=0)
        if longest <= score_beyond:
            return
    # [TILE_ROWS * BLOCK_GROUP, BLOCK_DIM]
    q = tl.load(
        q_ptr + (rows * stride_q_row + heads * stride_q_head)[:, None] + dims[None, :],
        mask=there[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    scored = there
    if WRITE_LOGITS:
        scored = there & (tl.load(lens_ptr + rows) > score_beyond)
    acc, peak, norm = attend_chunk(
        q,
        k_ptr + kv_head * stride_k_head,
        v_ptr + kv_head * stride_v_head,
        slots_ptr + tl.load(members).to(tl.int64) * stride_slots_row,
        logits_ptr + rows * stride_logits_row + heads * stride_logits_head if WRITE_LOGITS else heads,
        scored,
        begin,
        end,
        scale,
        logit_cap,
        stride_k_slot,
        stride_v_slot,
        DIM,
        DIM_V,
        BLOCK,
        TILE_ROWS * BLOCK_GROUP,
        BLOCK_DIM,
        BLOCK_DIM_V,
        HAS_CAP,
        WRITE_LOGITS,
    )
    out_rows = (item.to(tl.int64) * TILE_ROWS + queries // BLOCK_GROUP) * HEADS + heads
    store_part(partial_ptr, partial_lse_ptr, out_rows, there, acc, peak, norm, v_scale, DIM_V, BLOCK_DIM_V)


@triton.jit(
    do_not_specialize=["batch", "score_beyond", "fewest_items", "most_items", "preferred", "fewest", "most", "chunk"]
)
def merge_path_kernel(
    partial_ptr,
    partial_lse_ptr,
    shared_ptr,
    shared_lse_ptr,
    lens_ptr,
    starts_ptr,
    counts_ptr,
    group_starts_ptr,
    group_ends_ptr,
    parents_ptr,
    members_ptr,
    innermost_ptr,
    out_ptr,
    lse_ptr,
    batch,
    score_beyond,
    fewest_items,
    most_items,
    preferred,
    fewest,
    most,
    chunk,
    stride_lens_row,
    stride_lens_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    """One query head of one row from its own chunks and those of the groups that it is in, innermost first."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    _, chunks = plan(
        lens_ptr,
        starts_ptr,
        score_beyond,
        batch,
        stride_lens_row,
        fewest_items,
        most_items,
        preferred,
        BLOCK,
        BLOCK_ROWS,
        HAS_STARTS,
        DIM_V == 0,
    )
    rows = tl.arange(0, BLOCK_ROWS)
    acc, peak, norm = merge_row(
        partial_ptr, partial_lse_ptr, chunks, row, head, HEADS, DIM_V, BLOCK_DIM_V, BLOCK_ROWS, BLOCK_ITEMS
    )
    group = tl.load(innermost_ptr + row)
    if group >= 0:
        _, tiles, chunks = plan_groups(
            counts_ptr,
            group_starts_ptr,
            group_ends_ptr,
            batch,
            fewest,
            most,
            chunk,
            TILE_ROWS,
            BLOCK_SHARED,
            BLOCK_ROWS,
        )
        firsts = tl.cumsum(tiles * chunks, axis=0) - tiles * chunks
        while group >= 0:
            there = rows < tl.load(counts_ptr + group)
            members = tl.load(members_ptr + group.to(tl.int64) * batch + rows, mask=there, other=-1)
            place = tl.sum(tl.where(members == row, rows, 0), axis=0)
            num_tiles = pick(tiles, group, BLOCK_ROWS)
            first = pick(firsts, group, BLOCK_ROWS) + place // TILE_ROWS
            count = pick(chunks, group, BLOCK_ROWS)
            for start in range(0, count, BLOCK_ITEMS):
                items = start + tl.arange(0, BLOCK_ITEMS)
                places = ((first + items * num_tiles).to(tl.int64) * TILE_ROWS + place % TILE_ROWS) * HEADS + head
                acc, peak, norm = merge_parts(
                    acc, peak, norm, shared_ptr, shared_lse_ptr, places, items < count, DIM_V, BLOCK_DIM_V
                )
            group = tl.load(parents_ptr + group)
    store_merged(out_ptr, lse_ptr, row.to(tl.int64) * HEADS + head, acc, peak, norm, DIM_V, BLOCK_DIM_V)


def group_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lens: Tensor,
    groups: PrefixGroups,
    scaling: Scaling,
    *,
    logits: Tensor | None = None,
    score_beyond: int = 0,
    launch: Launch | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token a row by groups. Operands as in `grouped_decode`, already checked.

    Args:
        v_cache, logits, score_beyond: as in `split_decode`.
        launch, tile: instead of those of the launch tables.

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H].
    """
    batch, heads, _ = q.shape
    kv_heads, dim_v = k_cache.shape[1], v_cache.shape[2]
    q = q if q.stride(2) == 1 else q.contiguous()
    own = split(
        q,
        k_cache,
        v_cache,
        slots,
        lens,
        scaling,
        logits=logits,
        score_beyond=score_beyond,
        launch=launch,
        starts=groups.own_starts,
    )
    group = heads // kv_heads
    tile = tile or tile_for(q, dim_v, group)
    block_group = triton.next_power_of_2(group)
    tile_rows = max(1, tile.queries // block_group)
    wave = max(1, multiprocessors(q.device) // kv_heads)
    most = wave * tile.waves
    # A group has at least two rows, and a row is in at most MAX_LEVELS groups.
    items = most + batch + MAX_LEVELS * batch // tile_rows
    shared = torch.empty(items * tile_rows, heads, dim_v, dtype=torch.float32, device=q.device)
    shared_lse = torch.empty(items * tile_rows, heads, dtype=torch.float32, device=q.device)
    group_kernel[(kv_heads, items)](
        lens_ptr=lens,
        counts_ptr=groups.counts,
        starts_ptr=groups.starts,
        ends_ptr=groups.ends,
        members_ptr=groups.members,
        partial_ptr=shared,
        partial_lse_ptr=shared_lse,
        batch=batch,
        v_scale=scaling.v_scale,
        score_beyond=score_beyond,
        fewest_items=wave,
        most_items=most,
        preferred=tile.chunk,
        HEADS=heads,
        GROUP=group,
        DIM_V=dim_v,
        BLOCK=tile.block,
        BLOCK_GROUP=block_group,
        TILE_ROWS=tile_rows,
        BLOCK_DIM_V=max(16, triton.next_power_of_2(dim_v)),
        BLOCK_ROWS=plan_block(batch),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **attended(q, k_cache, v_cache, slots, logits, scaling),
    )
    out, lse = empty_results(q, dim_v)
    merge_path_kernel[(heads, batch)](
        partial_ptr=own.out,
        partial_lse_ptr=own.lse,
        shared_ptr=shared,
        shared_lse_ptr=shared_lse,
        counts_ptr=groups.counts,
        group_starts_ptr=groups.starts,
        group_ends_ptr=groups.ends,
        parents_ptr=groups.parents,
        members_ptr=groups.members,
        innermost_ptr=groups.innermost,
        out_ptr=out,
        lse_ptr=lse,
        score_beyond=score_beyond if dim_v == 0 else None,
        fewest=wave,
        most=most,
        chunk=tile.chunk,
        BLOCK_SHARED=tile.block,
        TILE_ROWS=tile_rows,
        BLOCK_ITEMS=8,
        num_warps=2,
        **own.cut,
    )
    return out, lse


def tile_for(q: Tensor, dim_v: int, group: int) -> Tile:
    """How the kernel of the shared parts runs, by the bytes of a head. A table: nothing is tuned at run time.

    At most 16 rows to a tile: results have room for whole tiles. Keys alone come twice as many at a time.
    """
    row_bytes = triton.next_power_of_2(max(q.shape[2], dim_v) * q.element_size())
    slots = 128 if dim_v == 0 else 64
    block = max(16, min(128, slots * 256 // row_bytes))
    queries = min(64 if row_bytes <= 512 else 32, 16 * triton.next_power_of_2(group))
    return Tile(queries=queries, block=block, warps=4, stages=3, waves=4, chunk=1024)
