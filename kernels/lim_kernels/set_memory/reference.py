"""Specification of the memory of sets in plain torch.

It asks the host which rows recall or store, which costs nothing on a CPU.
"""

import torch
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.row_actions import EARLY, RECALL, SELECT
from lim_kernels.set_memory.state import Decision, SetMemory


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
    rows, lens = rows.long(), seq_lens.int()
    real, long = rows != 0, lens > sizes.budget
    memory.clock.add_(1)
    written = slots.gather(1, (lens - 1).long().unsqueeze(1))[real, 0]
    memory.stamps[:, written.long()] = 0

    # Mixed steps, which are dense, add tokens in between.
    grown = lens - memory.lengths[rows]
    mine = real & (memory.tenants[rows] == tenants[rows]) & (grown >= 1)
    held = mine & long & (memory.lengths[rows] > sizes.budget)
    ages = memory.ages[rows] + grown
    kept = held & (ages < interval)
    warm = torch.zeros_like(real)
    wanting = (real & long & ~mine).nonzero().view(-1)
    if len(wanting):
        warm[wanting] = recall(memory, rows[wanting], slots[wanting], lens[wanting], sizes)
    uses_set = kept | warm if interval > 1 else torch.zeros_like(real)
    early_uses_set = (held | warm) & early

    memory.tenants[rows[real]] = tenants[rows[real]]
    memory.lengths[rows[real]] = lens[real]
    memory.ages[rows[real]] = ages.where(kept, 0)[real]
    actions = ~uses_set * SELECT + warm * RECALL + early_uses_set * EARLY
    return Decision(
        actions=actions.to(torch.uint8),
        choose_lens=lens.where(~uses_set, 1),
        select_uses_set=uses_set.to(torch.uint8),
        select_ends=sizes.budget + lens.where(~uses_set, 0),
        early_uses_set=early_uses_set.to(torch.uint8),
        early_ends=sizes.budget + lens.where(~early_uses_set, 0),
    )


def recall(memory: SetMemory, rows: Tensor, slots: Tensor, lens: Tensor, sizes: SetSizes) -> Tensor:
    """Make what the slots of these rows know their sets; bool [b], rows for which that is enough in every layer."""
    length, middle = slots.shape[1], sizes.middle
    positions = torch.arange(length, device=slots.device)
    candidate = (positions >= sizes.sinks) & (positions < lens.unsqueeze(1) - sizes.recent)
    # [S, b, L]
    stamps = memory.stamps[:, slots.where(candidate, 0).long()].long().where(candidate, 0)
    enough = ((stamps > 0).sum(2) >= middle).all(0)
    latest = (stamps * length + (length - 1 - positions)).topk(middle, dim=2).indices
    memory.sets[:, rows[enough]] = latest.sort(dim=2).values.int()[:, enough]
    return enough


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
    there = ((actions & SELECT) == 0) | ((actions & EARLY) != 0)
    _place(memory, layer, rows, there, extended, seq_lens, sizes)


def _place(
    memory: SetMemory,
    layer: int,
    rows: Tensor,
    there: Tensor,
    extended: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
) -> None:
    budget, ranked = sizes.budget, slice(sizes.sinks, sizes.budget - sizes.recent)
    items = there.nonzero().view(-1)
    forced = torch.arange(budget, device=extended.device).expand(len(items), budget)
    positions = forced + (seq_lens[items].long() - budget).unsqueeze(1).where(forced >= ranked.stop, 0)
    positions[:, ranked] = memory.sets[layer, rows[items].long()].long()
    extended[items, :budget] = extended[items, budget:].gather(1, positions)


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
    budget, ranked = sizes.budget, slice(sizes.sinks, sizes.budget - sizes.recent)
    selects = (actions & SELECT) != 0
    counts = seq_lens.clamp(max=budget).int()
    inside = torch.arange(budget, device=extended.device) < counts.unsqueeze(1)
    slots = extended[:, budget:].gather(1, chosen.where(inside & selects.unsqueeze(1), 0).long()).where(inside, 0)
    sets = torch.where(selects.unsqueeze(1), slots, extended[:, :budget])
    storing = (selects & (seq_lens > budget) & (rows != 0)).nonzero().view(-1)
    memory.sets[layer, rows[storing].long()] = chosen[storing, ranked]
    memory.stamps[layer, sets[storing, ranked].long()] = memory.clock
    if layer + 1 < len(memory.sets):
        _place(memory, layer + 1, rows, ~selects, extended, seq_lens, sizes)
    return sets, counts
