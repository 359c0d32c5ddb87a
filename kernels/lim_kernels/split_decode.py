"""Flash decode over KV slots in Triton: the kernel pair that sparse decode, decode with scores and scoring share.

Each row's slots are cut into chunks, every program attends one chunk for the query heads of one KV head, and a second
kernel merges a row's chunks. The cut is planned on the device from the lengths of all rows, so that a captured graph
serves any mixture of lengths with the programs its batch size gives: one wave of short chunks for a single row, many
waves of longer chunks (less tail, less prologue) where there is plenty of work.

Letting the program that finishes a row's last chunk merge them, by a ticket, was measured and is slower (H200, 2,048
slots: 8.4 to 14.7 us at batch 1, 42 to 46 us at batch 16): more registers, and more waits for memory in a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.decode_parts import attend_chunk, find_chunk, merge_row, plan, store_merged, store_part
from lim_kernels.operands import Scaling
from lim_kernels.triton_support import interpreting, multiprocessors, plan_block


@dataclass(frozen=True)
class Launch:
    """How the kernel runs; chosen by `launch_for` from measurements, or given by a benchmark."""

    block: int
    """Slots an iteration."""
    warps: int
    stages: int
    programs_per_sm: int
    """Programs that one multiprocessor holds at once: the unit of a wave."""
    waves: int
    """Most waves of chunks: bounds the buffers of partial results."""
    chunk: int
    """Preferred slots a chunk, between what one wave and what `waves` waves give."""


@triton.jit(do_not_specialize=["batch", "score_beyond", "fewest_items", "most_items", "preferred"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    lens_ptr,
    starts_ptr,
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
    stride_slots_head,
    stride_lens_row,
    stride_lens_head,
    stride_logits_row,
    stride_logits_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one KV head's query heads over one chunk of one row."""
    kv_head = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1)
    lens, chunks = plan(
        lens_ptr + kv_head * stride_lens_head,
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
    row, begin, end = find_chunk(lens, chunks, item, BLOCK, BLOCK_ROWS)
    if row >= batch:
        return
    row = row.to(tl.int64)
    if HAS_STARTS:
        first = tl.load(starts_ptr + row)
        begin += first
        end += first
    group = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + group
    in_group = group < GROUP

    # [BLOCK_GROUP, BLOCK_DIM]
    q = tl.load(
        q_ptr + row * stride_q_row + heads[:, None] * stride_q_head + dims[None, :],
        mask=in_group[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    scored = in_group
    if WRITE_LOGITS:
        scored = in_group & (tl.load(lens_ptr + row * stride_lens_row) > score_beyond)
    acc, peak, norm = attend_chunk(
        q,
        k_ptr + kv_head * stride_k_head,
        v_ptr + kv_head * stride_v_head,
        slots_ptr + row * stride_slots_row + kv_head * stride_slots_head,
        logits_ptr + row * stride_logits_row + heads * stride_logits_head if WRITE_LOGITS else heads,
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
        BLOCK_GROUP,
        BLOCK_DIM,
        BLOCK_DIM_V,
        HAS_CAP,
        WRITE_LOGITS,
    )
    out_rows = item.to(tl.int64) * HEADS + heads
    store_part(partial_ptr, partial_lse_ptr, out_rows, in_group, acc, peak, norm, v_scale, DIM_V, BLOCK_DIM_V)


@triton.jit(do_not_specialize=["batch", "score_beyond", "fewest_items", "most_items", "preferred"])
def merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    batch,
    score_beyond,
    fewest_items,
    most_items,
    preferred,
    stride_lens_row,
    stride_lens_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    """One query head of one row from its chunks."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    _, chunks = plan(
        lens_ptr + (head // GROUP) * stride_lens_head,
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
    acc, peak, norm = merge_row(
        partial_ptr, partial_lse_ptr, chunks, row, head, HEADS, DIM_V, BLOCK_DIM_V, BLOCK_ROWS, BLOCK_ITEMS
    )
    store_merged(out_ptr, lse_ptr, row.to(tl.int64) * HEADS + head, acc, peak, norm, DIM_V, BLOCK_DIM_V)


@dataclass(frozen=True)
class Parts:
    """Results of every chunk, and what a merge needs to find a row's."""

    out: Tensor
    """float32 [items, H, D_v]."""
    lse: Tensor
    """float32 [items, H]."""
    cut: dict[str, Any]
    """Keyword arguments that a kernel must be launched with to plan the same chunks."""


def split(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lens: Tensor,
    scaling: Scaling,
    *,
    logits: Tensor | None,
    score_beyond: int,
    launch: Launch | None,
    starts: Tensor | None = None,
) -> Parts:
    """Attention of each row's chunks. Arguments as in `split_decode`; with `starts` int32 [B] from there on."""
    batch, heads, _ = q.shape
    kv_heads, dim_v = k_cache.shape[1], v_cache.shape[2]
    launch = launch or launch_for(q, kv_heads, dim_v)
    wave = max(1, multiprocessors(q.device) * launch.programs_per_sm // kv_heads)
    most_items = wave * launch.waves
    items = min(most_items + batch, batch * triton.cdiv(slots.shape[-1], launch.block))
    out = torch.empty(items, heads, dim_v, dtype=torch.float32, device=q.device)
    lse = torch.empty(items, heads, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    cut = {
        "lens_ptr": lens,
        "starts_ptr": starts,
        "batch": batch,
        "fewest_items": wave,
        "most_items": most_items,
        "preferred": launch.chunk,
        "stride_lens_row": lens.stride(0),
        "stride_lens_head": lens.stride(1) if lens.dim() == 2 else 0,
        "HEADS": heads,
        "GROUP": group,
        "DIM_V": dim_v,
        "BLOCK": launch.block,
        "BLOCK_DIM_V": max(16, triton.next_power_of_2(dim_v)),
        "BLOCK_ROWS": plan_block(batch),
        "HAS_STARTS": starts is not None,
    }
    split_kernel[(kv_heads, items)](
        partial_ptr=out,
        partial_lse_ptr=lse,
        v_scale=scaling.v_scale,
        score_beyond=score_beyond,
        stride_slots_head=slots.stride(1) if slots.dim() == 3 else 0,
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **attended(q, k_cache, v_cache, slots, logits, scaling),
        **cut,
    )
    return Parts(out, lse, cut)


def attended(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, logits: Tensor | None, scaling: Scaling
) -> dict[str, Any]:
    """Arguments of every kernel that attends to a chunk: operands, strides, and what follows from them."""
    return {
        "q_ptr": q,
        "k_ptr": k_cache,
        "v_ptr": v_cache,
        "slots_ptr": slots,
        "logits_ptr": logits,
        "scale": scaling.scale * scaling.k_scale,
        "logit_cap": scaling.logit_cap,
        "stride_q_row": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_k_slot": k_cache.stride(0),
        "stride_k_head": k_cache.stride(1),
        "stride_v_slot": v_cache.stride(0),
        "stride_v_head": v_cache.stride(1),
        "stride_slots_row": slots.stride(0),
        "stride_logits_row": 0 if logits is None else logits.stride(0),
        "stride_logits_head": 0 if logits is None else logits.stride(1),
        "DIM": q.shape[2],
        "BLOCK_DIM": max(16, triton.next_power_of_2(q.shape[2])),
        "HAS_CAP": scaling.logit_cap > 0,
        "WRITE_LOGITS": logits is not None,
        "UPCAST": q.dtype == torch.float32 or interpreting(),
    }


def split_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lens: Tensor,
    scaling: Scaling,
    *,
    logits: Tensor | None = None,
    score_beyond: int = 0,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token a row over its slots. Operands as in `sparse_decode`, already checked.

    Args:
        v_cache: [num_slots, H_kv, D_v]; with a D_v of 0 keys are read for their logits alone.
        lens: valid leading slots, int32 or int64, [B] or [B, H_kv].
        logits: float32 [B, H, L] to be filled with scaled (and capped) logits, with `slots` [B, L].
        score_beyond: rows of at most so many slots need no logits; with a D_v of 0 they are not read.

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H].
    """
    q = q if q.stride(2) == 1 else q.contiguous()
    parts = split(
        q,
        k_cache,
        v_cache,
        slots,
        lens,
        scaling,
        logits=logits,
        score_beyond=score_beyond,
        launch=launch,
    )
    out, lse = empty_results(q, v_cache.shape[2])
    merge_kernel[(q.shape[1], q.shape[0])](
        partial_ptr=parts.out,
        partial_lse_ptr=parts.lse,
        out_ptr=out,
        lse_ptr=lse,
        score_beyond=score_beyond if v_cache.shape[2] == 0 else None,
        BLOCK_ITEMS=8,
        num_warps=2,
        **parts.cut,
    )
    return out, lse


def empty_results(q: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
    """out [B, H, dim_v] in q's dtype, lse float32 [B, H]; uninitialised."""
    batch, heads, _ = q.shape
    out = torch.empty(batch, heads, dim_v, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, dtype=torch.float32, device=q.device)


def launch_for(q: Tensor, kv_heads: int, dim_v: int) -> Launch:
    """Launch parameters by head size and number of rows. A table: nothing is tuned at run time.

    Measured at 256-byte keys on an H200; other sizes keep the bytes of an iteration.
    """
    row_bytes = max(q.shape[2], dim_v) * q.element_size()
    programs, room = q.shape[0] * kv_heads, multiprocessors(q.device)
    # Whether the rows alone keep the device busy, uncut. Of keys alone twice as many slots have the same bytes.
    busy = dim_v > 0 and programs >= room * 0.9
    slots = 64 if busy else 128
    block = max(16, min(256, slots * 256 // triton.next_power_of_2(row_bytes)))
    if busy:
        return Launch(block, warps=2, stages=3, programs_per_sm=2, waves=8, chunk=1024 if programs >= 3 * room else 512)
    return Launch(block, warps=4, stages=3, programs_per_sm=2, waves=8, chunk=1024)
