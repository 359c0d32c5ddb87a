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

from lim_kernels import SetSizes, decide_actions, find_prefix_groups, keep_sets, place_sets
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.set_memory import SetMemory
from sgl_lim.methods import Keeping


@dataclass(frozen=True)
class MixedRead:
    """What rows attend to in layers in which some read all of their context, and others the kept set before it."""

    slots: Tensor  # int32 [B, L], KV slot of each position
    seq_lens: Tensor  # int32 [B]
    on_sets: Tensor  # uint8 [B], rows that attend to the kept set
    ends: Tensor  # int32 [B], end of what a row attends to, in the extended slots
    room: int
    """Places for a set before the slots."""
    groups: PrefixGroups
    """Of the rows that read their context, by place in the extended slots."""

    def part(self, rows: slice) -> "MixedRead":
        """The same of some rows, without groups, which may reach over others."""
        return mixed_read(self.slots[rows], self.seq_lens[rows], self.on_sets[rows], self.ends[rows], None, self.room)


def mixed_read(
    slots: Tensor, seq_lens: Tensor, on_sets: Tensor, ends: Tensor, granule: int | None, room: int
) -> MixedRead:
    """A read with its groups; arguments as the fields."""
    # No prefix is longer than the rows are wide.
    at_least = slots.shape[1] + 1 if granule is None else granule
    groups = find_prefix_groups(slots, seq_lens, granule=at_least, set_columns=room, uses_set=on_sets)
    return MixedRead(slots, seq_lens, on_sets, ends, room, groups)


@dataclass
class KeptStep:
    """What the rows of one step do with the sets that they have."""

    rows: Tensor
    """integer [B], rows of the request pool."""
    actions: Tensor
    """uint8 [B], bits of `lim_kernels.row_actions`."""
    choose_lens: Tensor
    """int32 [B], lengths of rows that attend to everything at selection layers, 1 for others: nothing to choose."""
    extended: Tensor
    """int32 [B, K + L], room for a set, then the KV slot of each position (`Snapshot.extended`)."""
    selecting: MixedRead | None
    """Of selection layers; None where all rows select."""
    early: MixedRead | None
    """Of layers before the first selection layer; None where these attend to everything."""
    selections_done: int = 0
    """Selection layers that have run in this step."""


class KeptSets:
    """Sets by row of the request pool, and the time of the last selection by KV slot.

    Args:
        keeping: how sets outlive a step.
        sizes: budget, window and sinks of a set.
        num_selections: selection layers of the model.
        num_rows: rows of the request pool; num_slots: slots of the KV pool, padding included.
    """

    def __init__(
        self,
        keeping: Keeping,
        sizes: SetSizes,
        num_selections: int,
        *,
        num_rows: int,
        num_slots: int,
        device: torch.device | str,
    ) -> None:
        self.keeping, self._sizes = keeping, sizes
        # Where every row selects anew at every step, early layers alone attend to sets from before: the first one's.
        layers = num_selections if keeping.interval > 1 else 1
        per_row = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self.memory = SetMemory(
            sets=torch.zeros(layers, num_rows, sizes.middle, dtype=torch.int32, device=device),
            stamps=torch.zeros(layers, num_slots, dtype=torch.int32, device=device),
            tenants=torch.full((num_rows,), -1, dtype=torch.int64, device=device),
            lengths=per_row[0],
            ages=per_row[1],
            clock=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def keeps(self, step: KeptStep) -> bool:
        """Whether the set of the selection layer that runs next outlives the step."""
        return step.selections_done < len(self.memory.sets)

    def forget(self, slots: Tensor) -> None:
        """Clear the memory of KV slots that are about to be written: they have a new owner.

        Args:
            slots: integer [N].
        """
        self.memory.stamps.index_fill_(1, slots.long(), 0)

    def forget_rows(self, slots: Tensor, lens: Tensor) -> None:
        """Clear the memory of all slots of rows whose KV was not seen being written.

        Args:
            slots: int32 [b, L], KV slot of each position; lens: int64 [b], positions that are there.
        """
        there = torch.arange(slots.shape[1], device=slots.device) < lens.unsqueeze(1)
        # Slot 0 is padding, and remembers nothing.
        self.forget(slots.where(there, 0).flatten())

    def begin(self, rows: Tensor, tenants: Tensor, extended: Tensor, seq_lens: Tensor, granule: int | None) -> KeptStep:
        """Decide what each row of a decode step does, and bring the sets of those that do not select up to date.

        Args:
            rows: integer [B], rows of the request pool; row 0 only pads a captured graph.
            tenants: int64 [R], who has each row.
            extended: int32 [B, K + L], room for a set, then the KV slot of each position, which this step has written
                the last of.
            seq_lens: int32 [B].
            granule: as in `find_prefix_groups`; None: groups are not looked for.
        """
        interval, early, room = self.keeping.interval, self.keeping.early, self._sizes.budget
        slots = extended[:, room:]
        decided = decide_actions(
            self.memory, rows, tenants, slots, seq_lens, self._sizes, interval=interval, early=early
        )
        place_sets(self.memory, 0, rows, decided.actions, extended, seq_lens, self._sizes)
        step = KeptStep(rows, decided.actions, decided.choose_lens, extended, selecting=None, early=None)
        if interval > 1:
            step.selecting = mixed_read(slots, seq_lens, decided.select_uses_set, decided.select_ends, granule, room)
        if early:
            step.early = mixed_read(slots, seq_lens, decided.early_uses_set, decided.early_ends, granule, room)
        return step

    def keep(self, step: KeptStep, chosen: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Put the sets of a selection layer in force, and remember them.

        Args:
            chosen: int32 [B, K], positions that rows that attended to everything chose; undefined for others.
            seq_lens: int32 [B].

        Returns:
            The sets in force, int32 [B, K] in KV slots, and their counts.
        """
        layer = step.selections_done
        step.selections_done += 1
        return keep_sets(self.memory, layer, step.rows, step.actions, step.extended, seq_lens, chosen, self._sizes)
