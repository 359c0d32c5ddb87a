"""The memory of sets in Triton: a program a row decides, programs of a block of a row's set place and keep it.

Recalling passes over a row's slots several times in one program. It happens once a request, and launches that spread
it over the device would cost every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels import row_actions
from lim_kernels.operands import SetSizes
from lim_kernels.set_memory.state import Decision, SetMemory
from lim_kernels.triton_support import per_row_empty

_SELECT = tl.constexpr(row_actions.SELECT)
_RECALL = tl.constexpr(row_actions.RECALL)
_EARLY = tl.constexpr(row_actions.EARLY)
_PROBES = 8  # times compared at once
_BLOCK_TOKENS = 1024
_BLOCK_SET = 512


@triton.jit
def load_stamps(stamps_ptr, slots_ptr, positions, last, length):
    """When the slots of candidates at these positions were selected last, 0 for never and beyond the last candidate."""
    inside = positions < last
    slots = tl.load(slots_ptr + positions, mask=inside, other=0).to(tl.int64)
    # The step's own token is new, whatever its slot knew.
    return tl.load(stamps_ptr + slots, mask=inside & (positions < length - 1), other=0)


@triton.jit
def survey(stamps_ptr, slots_ptr, first, last, length, BLOCK: tl.constexpr):
    """How many candidates are known, and the earliest and the latest time among theirs."""
    known = tl.zeros([BLOCK], dtype=tl.int32)
    earliest = tl.full([BLOCK], 0x7FFFFFFF, dtype=tl.int32)
    latest = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(first, last, BLOCK):
        stamps = load_stamps(stamps_ptr, slots_ptr, start + tl.arange(0, BLOCK), last, length)
        known += (stamps > 0).to(tl.int32)
        earliest = tl.minimum(earliest, tl.where(stamps > 0, stamps, 0x7FFFFFFF))
        latest = tl.maximum(latest, stamps)
    return tl.sum(known, axis=0), tl.min(earliest, axis=0), tl.max(latest, axis=0)


@triton.jit
def deciding_time(
    stamps_ptr, slots_ptr, first, last, length, low, high, wanted, BLOCK: tl.constexpr, PROBES: tl.constexpr
):
    """The latest time since which `wanted` candidates were selected, and how many were after it."""
    later = tl.full([], 0, dtype=tl.int32)
    probes = 1 + tl.arange(0, PROBES)
    # At least `wanted` since `low`, fewer since `high` + 1.
    while high > low:
        # [PROBES], ascending in (low, high]; the last one is high.
        times = low + (((high - low).to(tl.int64) * probes + PROBES - 1) // PROBES).to(tl.int32)
        since = tl.zeros([BLOCK, PROBES], dtype=tl.int32)
        for start in range(first, last, BLOCK):
            stamps = load_stamps(stamps_ptr, slots_ptr, start + tl.arange(0, BLOCK), last, length)
            since += (stamps[:, None] >= times[None, :]).to(tl.int32)
        counts = tl.sum(since, axis=0)
        enough = counts >= wanted
        later = tl.maximum(later, tl.max(tl.where(enough, 0, counts), axis=0))
        reached = tl.max(tl.where(enough, times, low), axis=0)
        high = tl.maximum(tl.min(tl.where(enough, high + 1, times), axis=0) - 1, reached)
        low = reached
    return low, later


@triton.jit
def store_latest(set_ptr, stamps_ptr, slots_ptr, first, last, length, time, ties_wanted, BLOCK: tl.constexpr):
    """Write the positions of candidates selected after `time`, and of the first `ties_wanted` selected at it."""
    stored = tl.full([], 0, dtype=tl.int32)
    ties = tl.full([], 0, dtype=tl.int32)
    for start in range(first, last, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        stamps = load_stamps(stamps_ptr, slots_ptr, positions, last, length)
        tied = (stamps == time).to(tl.int32)
        kept = (stamps > time) | ((tied > 0) & (ties + tl.cumsum(tied, axis=0) <= ties_wanted))
        places = stored + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(set_ptr + places, positions, mask=kept)
        stored += tl.sum(kept.to(tl.int32), axis=0)
        ties += tl.sum(tied, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "budget", "recent", "sinks", "interval"])
def decide_kernel(
    sets_ptr,
    stamps_ptr,
    tenants_ptr,
    lengths_ptr,
    ages_ptr,
    clock_ptr,
    rows_ptr,
    owners_ptr,
    slots_ptr,
    lens_ptr,
    actions_ptr,
    choose_lens_ptr,
    select_uses_set_ptr,
    select_ends_ptr,
    early_uses_set_ptr,
    early_ends_ptr,
    num_rows,
    num_slots,
    budget,
    recent,
    sinks,
    interval,
    stride_slots,
    LAYERS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PROBES: tl.constexpr,
):
    """Decide for one row of the batch, and recall its sets where it has none."""
    item = tl.program_id(0)
    if item == 0:
        tl.store(clock_ptr, tl.load(clock_ptr) + 1)
    row = tl.load(rows_ptr + item).to(tl.int64)
    length = tl.load(lens_ptr + item).to(tl.int32)
    slots_ptr += item.to(tl.int64) * stride_slots
    real = row != 0
    long = length > budget
    owner = tl.load(owners_ptr + row)
    before = tl.load(lengths_ptr + row)
    mine = real & (tl.load(tenants_ptr + row) == owner) & (length > before)
    held = mine & long & (before > budget)
    age = tl.load(ages_ptr + row) + length - before
    kept = held & (age < interval)

    warm = length < 0
    if real & long & (mine == 0):
        first, last, middle = sinks, length - recent, budget - recent - sinks
        warm = length > 0
        for layer in range(LAYERS):
            layer_stamps = stamps_ptr + layer * num_slots.to(tl.int64)
            if warm:
                known, low, high = survey(layer_stamps, slots_ptr, first, last, length, BLOCK)
                warm = known >= middle
                if warm & (middle > 0):
                    time, later = deciding_time(
                        layer_stamps, slots_ptr, first, last, length, low, high, middle, BLOCK, PROBES
                    )
                    own_set = sets_ptr + (layer * num_rows.to(tl.int64) + row) * middle
                    store_latest(own_set, layer_stamps, slots_ptr, first, last, length, time, middle - later, BLOCK)

    uses_set = (kept | warm) & (interval > 1)
    early_uses_set = (held | warm) & EARLY
    actions = tl.where(uses_set, 0, _SELECT) + tl.where(warm, _RECALL, 0) + tl.where(early_uses_set, _EARLY, 0)
    tl.store(actions_ptr + item, actions.to(tl.uint8))
    tl.store(choose_lens_ptr + item, tl.where(uses_set, 1, length))
    tl.store(select_uses_set_ptr + item, uses_set.to(tl.uint8))
    tl.store(select_ends_ptr + item, tl.where(uses_set, budget, budget + length))
    tl.store(early_uses_set_ptr + item, early_uses_set.to(tl.uint8))
    tl.store(early_ends_ptr + item, tl.where(early_uses_set, budget, budget + length))
    # All warps have read what is written now.
    tl.debug_barrier()
    if real:
        tl.store(tenants_ptr + row, owner)
        tl.store(lengths_ptr + row, length)
        tl.store(ages_ptr + row, tl.where(kept, age, 0))
        written = tl.load(slots_ptr + length - 1).to(tl.int64)
        for layer in range(LAYERS):
            tl.store(stamps_ptr + layer * num_slots.to(tl.int64) + written, 0)


@triton.jit
def load_set(set_ptr, slots_ptr, columns, length, budget, recent, sinks):
    """KV slots of a row's set at these columns, its window moved along to `length`."""
    ranked = (columns >= sinks) & (columns < budget - recent)
    positions = tl.where(columns < sinks, columns, columns + length - budget)
    positions = tl.where(ranked, tl.load(set_ptr + columns - sinks, mask=ranked, other=0), positions)
    return tl.load(slots_ptr + positions, mask=columns < budget, other=0)


@triton.jit(do_not_specialize=["budget", "recent", "sinks"])
def place_kernel(
    set_ptr,
    rows_ptr,
    actions_ptr,
    extended_ptr,
    lens_ptr,
    budget,
    recent,
    sinks,
    stride_extended,
    BLOCK: tl.constexpr,
):
    """Place a block of one row's set before its slots."""
    item = tl.program_id(1)
    actions = tl.load(actions_ptr + item).to(tl.int32)
    if ((actions & _SELECT) != 0) & ((actions & _EARLY) == 0):
        return
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + item).to(tl.int64)
    length = tl.load(lens_ptr + item).to(tl.int32)
    room = extended_ptr + item.to(tl.int64) * stride_extended
    own_set = set_ptr + row * (budget - recent - sinks)
    slots = load_set(own_set, room + budget, columns, length, budget, recent, sinks)
    tl.store(room + columns, slots, mask=columns < budget)


@triton.jit(do_not_specialize=["budget", "recent", "sinks"])
def keep_kernel(
    set_ptr,
    next_set_ptr,
    stamps_ptr,
    clock_ptr,
    rows_ptr,
    actions_ptr,
    extended_ptr,
    lens_ptr,
    chosen_ptr,
    set_slots_ptr,
    counts_ptr,
    budget,
    recent,
    sinks,
    stride_extended,
    stride_chosen,
    HAS_NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep a block of one row's set, and place the next layer's where the row does not choose."""
    item = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    actions = tl.load(actions_ptr + item).to(tl.int32)
    row = tl.load(rows_ptr + item).to(tl.int64)
    length = tl.load(lens_ptr + item).to(tl.int32)
    count = tl.minimum(length, budget)
    middle = budget - recent - sinks
    room = extended_ptr + item.to(tl.int64) * stride_extended
    set_slots = set_slots_ptr + item.to(tl.int64) * budget
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + item, count)
    if (actions & _SELECT) != 0:
        inside = columns < count
        chosen = tl.load(chosen_ptr + item.to(tl.int64) * stride_chosen + columns, mask=inside, other=0)
        slots = tl.load(room + budget + chosen, mask=inside, other=0)
        tl.store(set_slots + columns, slots, mask=columns < budget)
        if (row != 0) & (length > budget):
            ranked = (columns >= sinks) & (columns < budget - recent)
            tl.store(set_ptr + row * middle + columns - sinks, chosen, mask=ranked)
            tl.store(stamps_ptr + slots.to(tl.int64), tl.load(clock_ptr), mask=ranked)
    else:
        tl.store(set_slots + columns, tl.load(room + columns, mask=columns < budget, other=0), mask=columns < budget)
        if HAS_NEXT:
            own_set = next_set_ptr + row * middle
            slots = load_set(own_set, room + budget, columns, length, budget, recent, sinks)
            # All warps have read what the room held.
            tl.debug_barrier()
            tl.store(room + columns, slots, mask=columns < budget)


def decide_actions(
    memory: SetMemory,
    rows: Tensor,
    tenants: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    interval: int,
    early: bool,
) -> Decision:
    """See `api.decide_actions`."""
    batch = len(rows)
    device, byte = slots.device, torch.uint8
    choose_lens, select_ends, early_ends = per_row_empty(3, batch, device=device)
    actions, select_uses_set, early_uses_set = per_row_empty(3, batch, device=device, dtype=byte)
    decide_kernel[(batch,)](
        sets_ptr=memory.sets,
        stamps_ptr=memory.stamps,
        tenants_ptr=memory.tenants,
        lengths_ptr=memory.lengths,
        ages_ptr=memory.ages,
        clock_ptr=memory.clock,
        rows_ptr=rows,
        owners_ptr=tenants,
        slots_ptr=slots,
        lens_ptr=seq_lens,
        actions_ptr=actions,
        choose_lens_ptr=choose_lens,
        select_uses_set_ptr=select_uses_set,
        select_ends_ptr=select_ends,
        early_uses_set_ptr=early_uses_set,
        early_ends_ptr=early_ends,
        num_rows=memory.sets.shape[1],
        num_slots=memory.stamps.shape[1],
        budget=sizes.budget,
        recent=sizes.recent,
        sinks=sizes.sinks,
        interval=interval,
        stride_slots=slots.stride(0),
        LAYERS=len(memory.sets),
        EARLY=early,
        BLOCK=_BLOCK_TOKENS,
        PROBES=_PROBES,
        num_warps=8,
    )
    return Decision(actions, choose_lens, select_uses_set, select_ends, early_uses_set, early_ends)


def place_sets(
    memory: SetMemory,
    layer: int,
    rows: Tensor,
    actions: Tensor,
    extended: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
) -> None:
    """See `api.place_sets`."""
    place_kernel[(triton.cdiv(sizes.budget, _BLOCK_SET), len(rows))](
        set_ptr=memory.sets[layer],
        rows_ptr=rows,
        actions_ptr=actions,
        extended_ptr=extended,
        lens_ptr=seq_lens,
        budget=sizes.budget,
        recent=sizes.recent,
        sinks=sizes.sinks,
        stride_extended=extended.stride(0),
        BLOCK=_BLOCK_SET,
        num_warps=4,
    )


def keep_sets(
    memory: SetMemory,
    layer: int,
    rows: Tensor,
    actions: Tensor,
    extended: Tensor,
    seq_lens: Tensor,
    chosen: Tensor,
    sizes: SetSizes,
) -> tuple[Tensor, Tensor]:
    """See `api.keep_sets`."""
    batch = len(rows)
    set_slots = torch.empty(batch, sizes.budget, dtype=torch.int32, device=extended.device)
    counts = torch.empty(batch, dtype=torch.int32, device=extended.device)
    following = layer + 1 < len(memory.sets)
    keep_kernel[(triton.cdiv(sizes.budget, _BLOCK_SET), batch)](
        set_ptr=memory.sets[layer],
        next_set_ptr=memory.sets[layer + 1] if following else None,
        stamps_ptr=memory.stamps[layer],
        clock_ptr=memory.clock,
        rows_ptr=rows,
        actions_ptr=actions,
        extended_ptr=extended,
        lens_ptr=seq_lens,
        chosen_ptr=chosen,
        set_slots_ptr=set_slots,
        counts_ptr=counts,
        budget=sizes.budget,
        recent=sizes.recent,
        sinks=sizes.sinks,
        stride_extended=extended.stride(0),
        stride_chosen=chosen.stride(0),
        HAS_NEXT=following,
        BLOCK=_BLOCK_SET,
        num_warps=4,
    )
    return set_slots, counts
