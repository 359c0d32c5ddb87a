"""The sets that verification leaves for the drafts behind it: positions, by row of the request pool.

While a pass verifies a row's tokens, each selection layer scores the context for the first of them, which is kept
whatever becomes of the drafts. What it chooses lies before that token, so a token that is rejected is in no set. Drafts
attend to the set and to all tokens behind it (`lim_kernels.draft_sets`). A row whose tenant has no set drafts on sinks
and a window: what a draft attends to decides whether it is accepted, never what is answered.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lim_kernels import DraftMemory, DraftSizes, place_drafts
from sgl_lim.methods import Method, Role
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.reads import Plan, Read

_ALIGNED = 16
"""Rows of slots that are as wide as a multiple of this load faster."""


class DraftSets:
    """Sets of the selection layers of one model, for the rows of a request pool.

    Args:
        method: whose sets they are; roles: of the model's layers.
        tokens: that one pass verifies of a row, at most.
        num_rows: of the request pool; kv_heads: of this rank, for sets by KV head.
    """

    def __init__(
        self,
        method: Ranked,
        roles: tuple[Role, ...],
        tokens: int,
        *,
        num_rows: int,
        kv_heads: int,
        device: torch.device | str,
    ) -> None:
        layers = [layer for layer, role in enumerate(roles) if role is Role.SELECT]
        self._places = {layer: place for place, layer in enumerate(layers)}
        # Layers before the first one that selects attend to its set.
        starts = [0, *layers[1:], len(roles)]
        readers = [end - start for start, end in itertools.pairwise(starts)]
        self._readers = torch.tensor(readers, dtype=torch.int64, device=device).unsqueeze(1)
        self._per_kv_head = method.per_kv_head
        # A set is at most two runs old: one in which all drafts were accepted, and the one that it drafts.
        room = -(-2 * tokens // _ALIGNED) * _ALIGNED
        self.sizes = DraftSizes(budget=method.budget, sinks=method.sizes.sinks, room=room)
        heads = kv_heads if method.per_kv_head else 1
        self.memory = DraftMemory.empty(len(layers), num_rows, heads, method.budget, device)

    @property
    def layers(self) -> int:
        """Selection layers."""
        return len(self._places)

    def forget(self, rows: Tensor) -> None:
        """A prefill runs on these rows of the request pool: whoever decodes there next has no set.

        Args:
            rows: int64 [B].
        """
        self.memory.tenants.index_fill_(0, rows, -1)

    def begin(self, rows: Tensor, tenants: Tensor, lens: Tensor) -> None:
        """All selection layers are about to keep sets of these rows; may be captured in a graph.

        Args:
            rows: integer [B], rows of the request pool; row 0 only pads a captured graph.
            tenants: int64 [R], who has each row.
            lens: int32 [B], of the rows when they choose, the token that chooses included.
        """
        rows = rows.long()
        self.memory.lengths.index_copy_(0, rows, lens.int())
        self.memory.tenants.index_copy_(0, rows, tenants[rows])

    def keep(self, layer: int, rows: Tensor, positions: Tensor, counts: Tensor) -> None:
        """Remember what a selection layer chose; may be captured in a graph.

        Args:
            layer: of the model.
            rows: as `begin` had them.
            positions: int32 [B, K], or [B, H_kv, K] with a set for each KV head; counts: int32 [B] or [B, H_kv].
        """
        place, rows = self._places[layer], rows.long()
        heads = self.memory.counts.shape[2]
        self.memory.sets[place].index_copy_(0, rows, positions.view(len(rows), heads, -1))
        self.memory.counts[place].index_copy_(0, rows, counts.view(len(rows), heads))

    def place(self, rows: Tensor, tenants: Tensor, slots: Tensor, seq_lens: Tensor) -> tuple[list[Read], Tensor]:
        """What the layers from each selection layer to the next attend to in a draft step.

        Args:
            rows: integer [B]; tenants: int64 [R]; slots: int32 [B, L]; seq_lens: int32 [B], the token drafted from
                included.

        Returns:
            A read for each selection layer; int64 [B], tokens that all layers attend to, of KV heads the mean.
        """
        placed, ends = place_drafts(self.memory, rows, tenants, slots, seq_lens, self.sizes)
        tokens = (self._readers * ends.sum(2)).sum(0) // ends.shape[2]
        if not self._per_kv_head:
            placed, ends = placed.squeeze(2), ends.squeeze(2)
        return [Read(*read) for read in zip(placed, ends, strict=True)], tokens


@dataclass(frozen=True)
class Drafts:
    """What makes decode lossless: shared by the backend that verifies and the one that drafts.

    Attributes:
        tokens: that one pass verifies of a row: the one that is known, and the drafts behind it.
        sets: that guide the drafts; None where drafts are ordinary steps of the method, or no row outgrows the budget.
        read: int64 [R], tokens that the draft steps of each row attended to since they were counted, over all layers.
    """

    tokens: int
    sets: DraftSets | None
    read: Tensor = field(repr=False)

    def take_read(self, rows: Tensor) -> Tensor:
        """int64 [B], `read` of these rows of the request pool, int64 [B]; it begins anew."""
        read = self.read[rows]
        self.read.index_fill_(0, rows, 0)
        return read


def plan_drafts(context: Read, placed: Sequence[Read]) -> Plan:
    """The plan of a step in which every layer attends to a set that was placed before it, and none selects.

    Args:
        context: everything that rows have.
        placed: of each selection layer; the layers before the first one attend to its set too.
    """
    return Plan(context.ends, context, dense=placed[0], select=(), choose_lens=context.ends, placed=iter(placed))


def read_unguided(method: Method, roles: Sequence[Role], seq_lens: Tensor) -> Tensor:
    """int64 [B], tokens that a step of the method attends to over all layers, if sets are as long as they may be."""
    to_set = (Role.SPARSE, Role.SELECT) if method.selection_attends == "set" else (Role.SPARSE,)
    sparse, lens = sum(role in to_set for role in roles), seq_lens.to(torch.int64)
    return (len(roles) - sparse) * lens + sparse * lens.clamp(max=method.budget)
