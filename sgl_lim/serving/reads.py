"""The plan of reads: which KV slots the layers of one decode step read, how far, and what they read together.

`plan_reads` makes one plan at the start of a step, with a read for each role of a layer. Layers attend by it
(`sgl_lim.serving.layer`), and counters count by it. A kind of layer that reads otherwise is one more read here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lim_kernels import find_prefix_groups
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods import Method, Role, SharedSets
from sgl_lim.serving.kept_sets import KeptStep

SCORE_BYTES = 3 << 29
"""Most memory that a selection layer's logits take; larger batches are scored in parts. It holds 96 rows of 131,072
tokens of 32 query heads."""


@dataclass(frozen=True)
class Read:
    """What the rows of a step attend to in a layer."""

    slots: Tensor  # int32 [B, W], or [B, H_kv, W] with a set for each KV head: the KV slot at each place
    ends: Tensor  # int32 [B], or [B, H_kv]: how many leading places a row attends to
    groups: PrefixGroups | None = None
    """Rows whose leading places hold equal slots, which are read once for all of them; None: each row by itself."""


@dataclass(frozen=True)
class ScoredRead:
    """A read of some rows of the batch whose logits are wanted."""

    read: Read
    rows: slice
    set_places: int
    """Leading places that have room for a kept set and are no positions of the context."""
    score_beyond: int
    """Rows that attend to no more places need no logits."""


@dataclass
class Plan:
    """The reads of one decode step. Its slots are copies: the scheduler may rewrite its rows while the step runs."""

    seq_lens: Tensor  # int32 [B], the current token included
    context: Read
    """Everything that a row has."""
    dense: Read
    """Of layers that do not select: the context, or with early sets the kept set of the step before."""
    select: tuple[ScoredRead, ...]
    """Of selection layers, rows that are scored together; none where no row can exceed the budget."""
    choose_lens: Tensor
    """int32 [B], lengths by which rows choose; 1 for rows that keep their set and have nothing to choose."""
    shared: SharedSets | None = None
    """Rows that choose what they share together, where not each for itself."""
    kept: KeptStep | None = None
    """What rows do that have a set from an earlier step, where sets outlive a step."""
    chosen: Read | None = None
    """The set in force; whoever chooses one replaces it."""
    placed: Iterator[Read] | None = None
    """Sets that were there before the step, one for each selection layer in turn, which then selects nothing."""

    @property
    def set_groups(self) -> PrefixGroups | None:
        """Rows whose sets have equal leading entries."""
        return None if self.shared is None else self.shared.in_sets

    def counted_groups(self, layers: Mapping[Role, int]) -> tuple[PrefixGroups | None, int]:
        """The prefix groups of this step, and how many layers read by them.

        Where roles read by different groups, those of whole contexts are counted, or else those of dense layers.

        Args:
            layers: how many there are of each role.
        """
        groups = self.dense.groups if self.context.groups is None else self.context.groups
        # Without a selection, these attend to everything.
        whole = self.context if not self.select else None
        reads = {Role.DENSE: self.dense, Role.SELECT: whole or self.select[0].read, Role.OWN: whole}
        by = sum(layers[role] for role, read in reads.items() if read is not None and read.groups is groups)
        return groups, 0 if groups is None else by


def plan_reads(
    method: Method,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    together: int,
    granule: int | None = None,
    kept: KeptStep | None = None,
) -> Plan:
    """The plan of a step; a method whose set needs no scores has it at once.

    Args:
        slots: int32 [B, L], KV slot of each position; seq_lens: int32 [B], the current token included.
        together: how many places of rows are scored at once, as `places_together` has it.
        granule: shared prefixes are found in multiples of so many tokens; None: they are not looked for.
        kept: of the same rows, where sets outlive a step.
    """
    groups, shared = None, None
    if granule is not None and len(seq_lens) > 1:
        # Where all layers read kept sets, nobody reads by the groups of whole contexts.
        if kept is None or kept.selecting is None or kept.early is None:
            groups = find_prefix_groups(slots, seq_lens, granule=granule)
        shared = method.share_sets(slots, seq_lens, granule)
    context = Read(slots, seq_lens, groups)
    early = None if kept is None else kept.early
    plan = Plan(
        seq_lens=seq_lens,
        context=context,
        dense=context if kept is None or early is None else Read(kept.extended, early.ends, early.groups),
        select=_scored_reads(method, context, together, kept),
        choose_lens=seq_lens if kept is None else kept.choose_lens,
        shared=shared,
        kept=kept,
    )
    initial = method.initial_set(seq_lens, slots.shape[1])
    if initial is not None:
        positions, counts = initial
        plan.chosen = Read(slots.gather(1, positions.clamp(min=0).long()), counts)
    return plan


def places_together(own_heads: int, score_bytes: int | None = None) -> int:
    """Places of rows whose logits fit into `score_bytes`, SCORE_BYTES by default: 4 bytes a query head of this rank."""
    return (SCORE_BYTES if score_bytes is None else score_bytes) // (4 * own_heads)


def score_together(batch: int, width: int, together: int) -> list[slice]:
    """Parts of a batch, about equally large, of so many places at most, or of one row."""
    most = max(1, together // width)
    step = -(-batch // -(-batch // most))
    return [slice(first, first + step) for first in range(0, batch, step)]


def _scored_reads(method: Method, context: Read, together: int, kept: KeptStep | None) -> tuple[ScoredRead, ...]:
    """What selection layers read: the context, or in rows that do not select in this step the kept set before it."""
    batch, width = context.slots.shape
    if method.budget >= width:
        return ()
    slices, budget, reads = score_together(batch, width, together), method.budget, []
    for rows in slices:
        if kept is None or kept.selecting is None:
            # Groups may reach over the rows that fit together.
            groups = context.groups if len(slices) == 1 else None
            read = Read(context.slots[rows], context.ends[rows], groups)
            reads.append(ScoredRead(read, rows, set_places=0, score_beyond=budget))
        else:
            part = kept.selecting if len(slices) == 1 else kept.selecting.part(rows)
            read = Read(kept.extended[rows], part.ends, part.groups)
            reads.append(ScoredRead(read, rows, set_places=budget, score_beyond=2 * budget))
    return tuple(reads)
