"""Sets that outlive a step: a row's own, reused between selections, and what selections left on each KV slot.

With `--lim-selection-interval n` a row selects every n-th step; in between its layers attend to the set that it has,
while the recency window moves along. A row that has none (a fork, a new turn, a request that was retracted) begins with
the tokens that were selected last on the slots it shares, if there are enough of them, and selects otherwise.

With `--lim-early-sets on` the layers before the first selection layer attend to its set of the step before, or to what
the slots remember; they attend to everything in rows that have neither.

Nothing here can belong to anybody else. A row's set is used only by the tenant that stored it, whose positions before
the window keep their tokens. It holds positions, because SGLang may give a row other slots for the same tokens: a
prefill's duplicates are freed, which can be after the first decode step. A slot's memory is cleared when the slot is
written, and no slot is read that its present owner has not written. All decisions are made on the device, from tensors
of fixed shapes (`lim_kernels.set_memory`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import decide_actions, find_prefix_groups, keep_sets, place_sets
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.set_memory import SetMemory
from sgl_lim.methods.lessismore import LessIsMore


@dataclass(frozen=True)
class Reading:
    """What rows attend to in layers that would attend to everything: that, or the set before their slots."""

    apart: Tensor
    """uint8 [B], rows that attend to the set."""
    ends: Tensor
    """int32 [B], end of what a row attends to in the extended slots."""
    groups: PrefixGroups
    """Groups of the other rows, by position in the extended slots."""


@dataclass
class Reuse:
    """What the layers of one step do with rows that have a set."""

    rows: Tensor
    """integer [B], rows of the request pool."""
    acts: Tensor
    """uint8 [B], bits of `lim_kernels.row_actions`."""
    choose_lens: Tensor
    """int32 [B], lengths of rows that attend to everything at selection layers, 1 for others: nothing to choose."""
    extended: Tensor
    """int32 [B, K + L], room for a set, then the KV slot of each position (`Snapshot.extended`)."""
    selecting: Reading | None
    """Of selection layers; None where all rows select."""
    early: Reading | None
    """Of layers before the first selection layer; None where these attend to everything."""
    done: int = 0
    """Selection layers that have run in this step."""


class SetStore:
    """Sets by row of the request pool, and the time of the last selection by KV slot.

    Args:
        method: its budget, window and sinks.
        interval: a row selects every so many steps.
        num_rows: rows of the request pool; num_slots: slots of the KV pool, padding included.
        early: whether the layers before the first selection layer attend to sets.
    """

    def __init__(
        self,
        method: LessIsMore,
        interval: int,
        num_rows: int,
        num_slots: int,
        device: torch.device | str,
        *,
        early: bool = False,
    ) -> None:
        self.interval, self.early = interval, early
        self._sizes = method.sizes
        # Where every row selects anew at every step, early layers alone attend to sets from before: the first one's.
        layers = len(method.selection_layers) if interval > 1 else 1
        per_row = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self.memory = SetMemory(
            sets=torch.zeros(layers, num_rows, method.middle, dtype=torch.int32, device=device),
            stamps=torch.zeros(layers, num_slots, dtype=torch.int32, device=device),
            tenants=torch.full((num_rows,), -1, dtype=torch.int64, device=device),
            lengths=per_row[0],
            ages=per_row[1],
            clock=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @property
    def reads_all(self) -> bool:
        """Whether all layers that would attend to everything attend to sets from before in rows that have one."""
        return self.early and self.interval > 1

    def keeps(self, reuse: Reuse) -> bool:
        """Whether the set of the selection layer that runs next outlives the step."""
        return reuse.done < len(self.memory.sets)

    def forget(self, slots: Tensor) -> None:
        """Clear the memory of KV slots that are about to be written: they have a new owner.

        Args:
            slots: integer [N].
        """
        self.memory.stamps.index_fill_(1, slots.long(), 0)

    def begin(self, rows: Tensor, tenants: Tensor, extended: Tensor, seq_lens: Tensor, granule: int | None) -> Reuse:
        """Decide what each row of a decode step does, and bring the sets of those that do not select up to date.

        Args:
            rows: integer [B], rows of the request pool; row 0 only pads a captured graph.
            tenants: int64 [R], who has each row.
            extended: int32 [B, K + L], room for a set, then the KV slot of each position, which this step has written
                the last of.
            seq_lens: int32 [B].
            granule: as in `find_prefix_groups`; None: groups are not looked for.
        """
        budget = self._sizes.budget
        slots = extended[:, budget:]
        decided = decide_actions(
            self.memory, rows, tenants, slots, seq_lens, self._sizes, interval=self.interval, early=self.early
        )
        place_sets(self.memory, 0, rows, decided.actions, extended, seq_lens, self._sizes)
        reuse = Reuse(rows, decided.actions, decided.choose_lens, extended, selecting=None, early=None)
        if self.interval > 1:
            reuse.selecting = read(slots, seq_lens, decided.select_uses_set, decided.select_ends, granule, budget)
        if self.early:
            reuse.early = read(slots, seq_lens, decided.early_uses_set, decided.early_ends, granule, budget)
        return reuse

    def keep(self, reuse: Reuse, chosen: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Put the sets of a selection layer in force, and remember them.

        Args:
            chosen: int32 [B, K], positions that rows that attended to everything chose; undefined for others.
            seq_lens: int32 [B].

        Returns:
            The sets in force, int32 [B, K] in KV slots, and their counts.
        """
        layer = reuse.done
        reuse.done += 1
        return keep_sets(self.memory, layer, reuse.rows, reuse.acts, reuse.extended, seq_lens, chosen, self._sizes)


def read(slots: Tensor, seq_lens: Tensor, apart: Tensor, ends: Tensor, granule: int | None, lead: int) -> Reading:
    """What rows attend to, with the groups of those that are not apart; none are looked for if `granule` is None."""
    # No prefix is longer than the rows are wide.
    granule = slots.shape[1] + 1 if granule is None else granule
    return Reading(apart, ends, find_prefix_groups(slots, seq_lens, granule=granule, set_columns=lead, uses_set=apart))
