"""Draft sets in Triton: programs of a block of one set."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.draft_sets.state import DraftMemory, DraftSizes

_BLOCK = 512


@triton.jit(do_not_specialize=["batch", "num_rows", "budget", "sinks", "room", "width"])
def place_drafts_kernel(
    sets_ptr,
    counts_ptr,
    lengths_ptr,
    owners_ptr,
    rows_ptr,
    tenants_ptr,
    slots_ptr,
    lens_ptr,
    placed_ptr,
    ends_ptr,
    batch,
    num_rows,
    budget,
    sinks,
    room,
    width,
    stride_slots,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Place a block of the set of one selection layer, row and head."""
    item = tl.program_id(1)
    layer = tl.program_id(2) // HEADS
    head = tl.program_id(2) % HEADS
    row = tl.load(rows_ptr + item).to(tl.int64)
    length = tl.load(lens_ptr + item).to(tl.int32)
    chosen_at = tl.load(lengths_ptr + row)
    mine = tl.load(owners_ptr + row) == tl.load(tenants_ptr + row)
    since = length - chosen_at
    has_set = mine & (since > 0) & (since <= room) & (length > budget)
    own_set = (layer * num_rows.to(tl.int64) + row) * HEADS + head
    count = tl.load(counts_ptr + own_set)
    end = tl.where(has_set, count + since, tl.minimum(length, budget))

    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < end
    skipped = tl.where(columns >= sinks, tl.maximum(length - budget, 0), 0)
    chosen = tl.load(sets_ptr + own_set * budget + columns, mask=has_set & inside & (columns < count), other=0)
    in_set = tl.where(columns < count, chosen, chosen_at + columns - count)
    positions = tl.where(has_set, in_set, columns + skipped)
    slots = tl.load(slots_ptr + item.to(tl.int64) * stride_slots + positions, mask=inside, other=0)
    place = (layer.to(tl.int64) * batch + item) * HEADS + head
    tl.store(placed_ptr + place * width + columns, slots, mask=columns < width)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + place, end)


def place_drafts(
    memory: DraftMemory, rows: Tensor, tenants: Tensor, slots: Tensor, seq_lens: Tensor, sizes: DraftSizes
) -> tuple[Tensor, Tensor]:
    """See `api.place_drafts`."""
    layers, num_rows, heads, _ = memory.sets.shape
    batch = len(rows)
    placed = torch.empty(layers, batch, heads, sizes.width, dtype=torch.int32, device=slots.device)
    ends = torch.empty(layers, batch, heads, dtype=torch.int32, device=slots.device)
    place_drafts_kernel[(triton.cdiv(sizes.width, _BLOCK), batch, layers * heads)](
        sets_ptr=memory.sets,
        counts_ptr=memory.counts,
        lengths_ptr=memory.lengths,
        owners_ptr=memory.tenants,
        rows_ptr=rows,
        tenants_ptr=tenants,
        slots_ptr=slots,
        lens_ptr=seq_lens,
        placed_ptr=placed,
        ends_ptr=ends,
        batch=batch,
        num_rows=num_rows,
        budget=sizes.budget,
        sinks=sizes.sinks,
        room=sizes.room,
        width=sizes.width,
        stride_slots=slots.stride(0),
        HEADS=heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return placed, ends
