"""Sets that outlive a step: a row's own, reused between selections, and what selections left on each KV slot.

With `--lim-selection-interval n` a row selects every n-th step; in between its layers attend to the set that it has,
while the recency window moves along. A row that has none (a fork, a new turn, a request that was retracted) begins with
the tokens that were selected last on the slots it shares, if there are enough of them, and selects otherwise.

Nothing here can belong to anybody else. A row's set is used only by the tenant that stored it, whose positions before
the window keep their tokens. It holds positions, because SGLang may give a row other slots for the same tokens: a
prefill's duplicates are freed, which can be after the first decode step. A slot's memory is cleared when the slot is
written, and no slot is read that its present owner has not written. All decisions are made on the device, from tensors
of fixed shapes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lim_kernels import choose_tokens, find_prefix_groups
from lim_kernels.count_step import KEEP, RECALL, SELECT
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods.lessismore import LessIsMore

NEVER = 0


@dataclass
class Reuse:
    """What the selection layers of one step do with rows that do not select."""

    rows: Tensor
    """int64 [B], rows of the request pool."""
    full: Tensor
    """bool [B], rows that attend to everything: they select, or have no more tokens than the budget."""
    acts: Tensor
    """uint8 [B], the same as `count_step` takes it."""
    sel_lens: Tensor
    """int32 [B], lengths of those rows, 1 for the others, which have nothing to choose."""
    extended: Tensor
    """int32 [B, K + L], room for a set, then the KV slot of each position (`Snapshot.extended`)."""
    ends: Tensor
    """int32 [B], end of what a row attends to in the extended slots."""
    groups: PrefixGroups
    """Groups of the rows that attend to everything, by position in the extended slots."""
    prior: list[Tensor]
    """For each selection layer int64 [B, K], the sets of rows that do not select, in positions."""
    done: int = 0
    """Selection layers that have run in this step."""


class SetStore:
    """Sets by row of the request pool, and the time of the last selection by KV slot.

    Args:
        method: its budget, window and sinks.
        interval: a row selects every so many steps, at least 2.
        num_rows: rows of the request pool; num_slots: slots of the KV pool, padding included.
    """

    def __init__(
        self, method: LessIsMore, interval: int, num_rows: int, num_slots: int, device: torch.device | str
    ) -> None:
        self.interval = interval
        self._method = method
        layers = len(method.selection_layers)
        self._sets = torch.zeros(layers, num_rows, method.budget, dtype=torch.int32, device=device)
        self._tenants = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._ages = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._stamps = torch.full((layers, num_slots), NEVER, dtype=torch.int32, device=device)
        self._clock = torch.full((), NEVER, dtype=torch.int32, device=device)

    def forget(self, slots: Tensor) -> None:
        """Clear the memory of KV slots that are about to be written: they have a new owner.

        Args:
            slots: integer [N].
        """
        self._stamps.index_fill_(1, slots.long(), NEVER)

    def begin(
        self, rows: Tensor, tenants: Tensor, extended: Tensor, seq_lens: Tensor, written: Tensor, granule: int | None
    ) -> Reuse:
        """Decide what each row of a decode step does, and bring the sets of those that do not select up to date.

        Args:
            rows: int64 [B], rows of the request pool; row 0 only pads a captured graph.
            tenants: int64 [R], who has each row.
            extended: int32 [B, K + L], room for a set, then the KV slot of each position.
            seq_lens: int32 [B].
            written: integer [B], slots of this step's tokens.
            granule: as in `find_prefix_groups`; None: groups are not looked for.
        """
        method = self._method
        budget = method.budget
        self._clock += 1
        self.forget(written)
        slots = extended[:, budget:]
        long = seq_lens > budget
        tenant = tenants[rows]
        # Mixed steps, which are dense, add tokens in between; the positions of its set hold the same ones still.
        grown = seq_lens - self._lengths[rows]
        mine = (self._tenants[rows] == tenant) & (grown >= 1) & (rows != 0)
        ages = self._ages[rows] + grown
        kept = long & mine & (ages < self.interval)
        prior, warm = self._recall(rows, slots, seq_lens, long & ~mine, kept)
        full = ~(kept | warm)
        self._tenants[rows] = tenant
        self._lengths[rows] = seq_lens
        # A row that was within the budget has stored no set that could be used.
        self._ages[rows] = torch.where(kept, ages, torch.where(long, 0, self.interval)).int()

        groups = no_groups(torch.zeros_like(seq_lens))
        if granule is not None and len(rows) > 1:
            groups = find_prefix_groups(slots, torch.where(full, seq_lens, 1).int(), granule=granule)
        shifted = replace(
            groups,
            starts=groups.starts + budget,
            ends=groups.ends + budget,
            own_starts=torch.where(full, groups.own_starts + budget, 0).int(),
        )
        return Reuse(
            rows=rows,
            full=full,
            sel_lens=torch.where(full, seq_lens, 1).int(),
            extended=extended,
            ends=torch.where(full, seq_lens + budget, budget).int(),
            acts=torch.where(warm, RECALL, torch.where(kept, KEEP, SELECT)).to(torch.uint8),
            groups=shifted,
            prior=prior,
        )

    def keep(self, reuse: Reuse, chosen: Tensor, counts: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Put the sets of a selection layer in force, and remember them.

        Args:
            chosen, counts: int32 [B, K], [B], positions that rows that attended to everything chose; undefined for
                others.
            slots: int32 [B, L], KV slot of each position.

        Returns:
            The sets in force, int32 [B, K] in KV slots, and their counts.
        """
        layer, method = reuse.done, self._method
        reuse.done += 1
        selected = reuse.full & (reuse.sel_lens > method.budget)
        sets = torch.where(reuse.full.unsqueeze(1), chosen, reuse.prior[layer]).clamp(min=0)
        self._sets[layer][reuse.rows] = sets.int()
        set_slots = slots.gather(1, sets)
        ranked = set_slots[:, method.kept_sinks : method.budget - method.recent]
        # Rows that did not select mark the padding slot, which nobody asks about.
        self._stamps[layer][torch.where(selected.unsqueeze(1), ranked, 0).long()] = self._clock
        return set_slots, torch.where(reuse.full, counts, method.budget).int()

    def _recall(
        self, rows: Tensor, slots: Tensor, seq_lens: Tensor, without: Tensor, kept: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Sets of rows that have one and of those that find one on their slots, and which rows do; the latter bool [B].

        Args:
            without: bool [B], rows that need a set and have none; kept: bool [B], rows that use their own again.
        """
        method = self._method
        budget, sinks, recent = method.budget, method.kept_sinks, method.recent
        positions = torch.arange(slots.shape[1], device=slots.device)
        window = seq_lens.unsqueeze(1) - recent + torch.arange(recent, device=slots.device)
        candidate = (positions >= sinks) & (positions < seq_lens.unsqueeze(1) - recent)
        warm, remembered = without, []
        for stamps in self._stamps:
            stamp = stamps[slots.where(candidate, 0).long()]
            known = candidate & (stamp != NEVER)
            warm = warm & (known.sum(1) >= budget - sinks - recent)
            remembered.append((stamp - self._clock).float().where(known, float("-inf")))
        prior = []
        for layer, scores in enumerate(remembered):
            lens = torch.where(warm, seq_lens, 1).int()
            found, _ = choose_tokens(scores, lens, budget=budget, recent=recent, sinks=sinks)
            own = self._sets[layer][rows]
            own[:, budget - recent :] = window
            prior.append(torch.where(kept.unsqueeze(1), own, found).clamp(min=0).long())
        return prior, warm


def no_groups(own_starts: Tensor) -> PrefixGroups:
    """Groups of rows that share nothing; each attends from its entry of int32 [B] `own_starts` on."""
    batch, none = len(own_starts), torch.zeros_like(own_starts)
    return PrefixGroups(
        counts=none,
        starts=none,
        ends=none,
        parents=none - 1,
        members=none.unsqueeze(1).expand(batch, batch).contiguous(),
        own_starts=own_starts,
        paths=none - 1,
        followed=none,
    )
