"""What flash-decode kernels are made of: how rows are cut, attention over a chunk, merging of results."""

import triton
import triton.language as tl


@triton.jit
def plan(
    lens_ptr,
    starts_ptr,
    score_beyond,
    batch,
    stride_row,
    fewest_items,
    most_items,
    preferred,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SKIP_SHORT: tl.constexpr,
):
    """Slots of each row (HAS_STARTS: from its start on), and into how many chunks they are cut.

    With SKIP_SHORT rows of at most `score_beyond` slots have none: nobody asks for their logits.

    A row of n slots is cut into equal chunks, multiples of BLOCK, of about max(total / most_items, min(preferred,
    total / fewest_items)) slots, so there are at most `most_items + batch` work items.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    lens = tl.load(lens_ptr + rows * stride_row, mask=rows < batch, other=0).to(tl.int32)
    whole = lens
    if HAS_STARTS:
        lens -= tl.load(starts_ptr + rows, mask=rows < batch, other=0)
    if SKIP_SHORT:
        lens = tl.where(whole > score_beyond, lens, 0)
    return lens, tl.cdiv(lens, chunk_size(tl.sum(lens, axis=0), fewest_items, most_items, preferred, BLOCK))


@triton.jit
def chunk_size(total, fewest_items, most_items, preferred, BLOCK: tl.constexpr):
    """About how many slots a chunk has where `total` of them are to be attended to."""
    size = tl.maximum(tl.cdiv(total, most_items), tl.minimum(preferred, tl.cdiv(total, fewest_items)))
    return tl.maximum(tl.cdiv(size, BLOCK), 1) * BLOCK


@triton.jit
def find_chunk(lens, chunks, item, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Row, first slot and end of work item `item`; the row is at least the batch for items beyond the last."""
    row, index = locate(chunks, item, BLOCK_ROWS)
    length = pick(lens, row, BLOCK_ROWS)
    size = even_size(length, tl.maximum(pick(chunks, row, BLOCK_ROWS), 1), BLOCK)
    return row, index * size, tl.minimum((index + 1) * size, length)


@triton.jit
def locate(counts, item, BLOCK_ROWS: tl.constexpr):
    """Whose work item `item` is where each has `counts` of them, and which of theirs; BLOCK_ROWS beyond the last."""
    ends = tl.cumsum(counts, axis=0)
    owner = tl.sum((ends <= item).to(tl.int32), axis=0)
    return owner, item - pick(ends - counts, owner, BLOCK_ROWS)


@triton.jit
def pick(values, place, BLOCK_ROWS: tl.constexpr):
    """One entry of [BLOCK_ROWS] values."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_ROWS) == place, values, 0), axis=0)


@triton.jit
def even_size(length, count, BLOCK: tl.constexpr):
    """Slots of each of `count` chunks, a multiple of BLOCK."""
    return tl.cdiv(tl.cdiv(length, count), BLOCK) * BLOCK


@triton.jit
def attend_chunk(
    q,
    k_head_ptr,
    v_head_ptr,
    slots_ptr,
    logits_ptrs,
    logits_wanted,
    begin,
    end,
    scale,
    logit_cap,
    stride_k_slot,
    stride_v_slot,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
):
    """Queries [BLOCK_QUERIES, BLOCK_DIM] of one KV head over positions `begin` … `end` - 1 of a row of slots.

    Logits go to `logits_ptrs` + position where `logits_wanted`, both [BLOCK_QUERIES]. Values of no width (DIM_V of 0)
    are not read.

    Returns:
        Weighted values [BLOCK_QUERIES, BLOCK_DIM_V], and of each query the largest logit (base 2) and the sum of
        weights relative to it.
    """
    dims = tl.arange(0, BLOCK_DIM)
    dims_v = tl.arange(0, BLOCK_DIM_V)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM_V], dtype=tl.float32)
    peak = tl.full([BLOCK_QUERIES], -float("inf"), dtype=tl.float32)
    norm = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        inside = positions < end
        slots = tl.load(slots_ptr + positions, mask=inside, other=0).to(tl.int64)
        # [BLOCK, BLOCK_DIM]
        k = tl.load(
            k_head_ptr + slots[:, None] * stride_k_slot + dims[None, :],
            mask=inside[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        # [BLOCK_QUERIES, BLOCK]
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        if HAS_CAP:
            logits = logit_cap * (2.0 / (1.0 + tl.exp(-2.0 * logits / logit_cap)) - 1.0)
        if WRITE_LOGITS:
            tl.store(logits_ptrs[:, None] + positions[None, :], logits, mask=logits_wanted[:, None] & inside[None, :])
        logits = tl.where(inside[None, :], logits * 1.4426950408889634, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        norm = norm * rescale + tl.sum(weights, axis=1)
        peak = new_peak
        if DIM_V > 0:
            # [BLOCK, BLOCK_DIM_V]
            v = tl.load(
                v_head_ptr + slots[:, None] * stride_v_slot + dims_v[None, :],
                mask=inside[:, None] & (dims_v < DIM_V)[None, :],
                other=0.0,
            )
            acc = acc * rescale[:, None]
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return acc, peak, norm


@triton.jit
def merge_parts(
    acc, peak, norm, partial_ptr, partial_lse_ptr, places, there, DIM_V: tl.constexpr, BLOCK_DIM_V: tl.constexpr
):
    """Add the partial results at `places`, where `there`, to a query head's."""
    dims_v = tl.arange(0, BLOCK_DIM_V)
    lse = tl.load(partial_lse_ptr + places, mask=there, other=-float("inf"))
    if DIM_V > 0:
        parts = tl.load(
            partial_ptr + places[:, None] * DIM_V + dims_v[None, :],
            mask=there[:, None] & (dims_v < DIM_V)[None, :],
            other=0.0,
        )
    new_peak = tl.maximum(peak, tl.max(lse, axis=0))
    weights = tl.exp(lse - new_peak)
    rescale = tl.exp(peak - new_peak)
    if DIM_V > 0:
        acc = acc * rescale + tl.sum(parts * weights[:, None], axis=0)
    return acc, new_peak, norm * rescale + tl.sum(weights, axis=0)


@triton.jit
def store_part(
    partial_ptr,
    partial_lse_ptr,
    out_rows,
    there,
    acc,
    peak,
    norm,
    v_scale,
    DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
):
    """Store what `attend_chunk` returned, at rows [BLOCK_QUERIES] of the partial results, where `there`."""
    dims_v = tl.arange(0, BLOCK_DIM_V)
    if DIM_V > 0:
        tl.store(
            partial_ptr + out_rows[:, None] * DIM_V + dims_v[None, :],
            acc * (v_scale / norm)[:, None],
            mask=there[:, None] & (dims_v < DIM_V)[None, :],
        )
    tl.store(partial_lse_ptr + out_rows, (peak + tl.log2(norm)) * 0.6931471805599453, mask=there)


@triton.jit
def merge_row(
    partial_ptr,
    partial_lse_ptr,
    chunks,
    row,
    head,
    HEADS: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    """One query head's result over all chunks of its row, as `merge_parts` takes and returns it."""
    first = tl.sum(tl.where(tl.arange(0, BLOCK_ROWS) < row, chunks, 0), axis=0)
    count = pick(chunks, row, BLOCK_ROWS)
    acc = tl.zeros([BLOCK_DIM_V], dtype=tl.float32)
    peak = tl.full([], -float("inf"), dtype=tl.float32)
    norm = tl.full([], 0.0, dtype=tl.float32)
    for start in range(0, count, BLOCK_ITEMS):
        items = start + tl.arange(0, BLOCK_ITEMS)
        places = (first + items).to(tl.int64) * HEADS + head
        acc, peak, norm = merge_parts(
            acc, peak, norm, partial_ptr, partial_lse_ptr, places, items < count, DIM_V, BLOCK_DIM_V
        )
    return acc, peak, norm


@triton.jit
def store_merged(out_ptr, lse_ptr, out_row, acc, peak, norm, DIM_V: tl.constexpr, BLOCK_DIM_V: tl.constexpr):
    """Store a query head's result, merged of all its parts."""
    dims_v = tl.arange(0, BLOCK_DIM_V)
    if DIM_V > 0:
        tl.store(out_ptr + out_row * DIM_V + dims_v, (acc / norm).to(out_ptr.dtype.element_ty), mask=dims_v < DIM_V)
    tl.store(lse_ptr + out_row, peak + tl.log(norm))
