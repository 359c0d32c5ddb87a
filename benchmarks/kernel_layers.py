"""Whole selection layers for `kernel_sections.py`: what they launch, and how far they are from the reference."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_operands import (
    Operands,
    Selection,
    Shape,
    checked_rows,
    decode_deviation,
    scores_deviation,
    set_deviation,
    slots_to_positions,
)
from lim_kernels import Scaling, decode_with_scores, grouped_decode, score_context, sparse_decode
from lim_kernels.prefix_groups import PrefixGroups

ATTENDS = {"context": "decode_with_scores", "set": "score_context"}
"""What selection layers attend to, and the operator that gives them their logits."""


@dataclass(frozen=True)
class SelectionLayer:
    """What a selection layer does beside its projections."""

    selection: Selection
    aggregate: str
    attends: str
    implementation: str
    groups: PrefixGroups | None = None
    """Rows whose shared slots are read once."""

    @property
    def op(self) -> str:
        """Its operators."""
        first = "grouped_decode" if self.groups and self.attends == "context" else ATTENDS[self.attends]
        last = " + sparse_decode" * (self.attends == "set")
        return f"{first} + score_tokens + choose_tokens{last}"

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lens: Tensor, *, scale: float
    ) -> tuple[Tensor, ...]:
        """Out, lse, logits, and the chosen slots with their counts."""
        ours: dict[str, Any] = {"implementation": self.implementation}
        how: dict[str, Any] = {"score_beyond": self.selection.budget, **ours}
        place, scaling = (slots, lens), Scaling(scale)
        out: Tensor | None = None
        logits: Tensor | None
        if self.attends == "set":
            lse, logits = score_context(q, keys, *place, scaling, groups=self.groups, **how)
        elif self.groups is None:
            out, lse, logits = decode_with_scores(q, keys, values, *place, scaling, **how)
        else:
            out, lse, logits = grouped_decode(q, keys, values, *place, self.groups, scaling, scored=True, **how)
        assert logits is not None
        scores = self.selection.score(logits, lens, lse, aggregate=self.aggregate, **ours)
        chosen, counts = self.selection.choose(scores, lens, slots, **ours)
        if out is None:
            out, _ = sparse_decode(q, keys, values, chosen, counts, scale=scale, **ours)
        return out, lse, logits, chosen, counts

    def kv_bytes(self, shape: Shape, batch: int, context: int, stored: int) -> int:
        """Bytes of what it reads once: of the `stored` tokens of all contexts, and of the rows' sets."""
        if self.attends == "context":
            return shape.kv_bytes(stored)
        return shape.kv_bytes(stored) // 2 + shape.kv_bytes(batch * min(context, self.selection.budget))

    def deviation(self, operands: Operands, found: tuple[Tensor, ...]) -> float:
        """Deviation of attention and logits, or 1 if the set is not the reference's of the very logits that were found.

        Args:
            found: what the first call of `operands.calls` returned.
        """
        out, lse, logits, chosen, counts = found
        if logits.shape[2] <= self.selection.budget:
            # Nothing is scored, and the set is the context.
            return decode_deviation(operands, out)
        rows = checked_rows(len(out))
        lens = operands.lens[rows]
        scores = self.selection.score(
            logits[rows], lens, lse[rows], aggregate=self.aggregate, implementation="reference"
        )
        positions = slots_to_positions(chosen[rows], operands.slots[0][rows])
        if set_deviation(positions, counts[rows], scores, lens, self.selection):
            return 1.0
        if self.attends == "context":
            return decode_deviation(operands, out, lse, logits)
        # Unlike Python's, this maximum keeps a NaN.
        both = scores_deviation(operands, lse, logits), set_attention_deviation(operands, out, chosen, counts)
        return float(torch.tensor(both).max())


def set_attention_deviation(operands: Operands, out: Tensor, chosen: Tensor, counts: Tensor) -> float:
    """Largest ‖a − b‖ / ‖b‖ of out [B, H, D] and attention in float64 over the chosen slots, in the checked rows."""
    keys, values = operands.caches[0]
    deviations = []
    for row in checked_rows(len(out)):
        slots = chosen[row, : int(counts[row])].long()
        wanted, _ = sparse_decode(
            operands.q[row : row + 1].double(),
            keys[slots].double(),
            values[slots].double(),
            torch.arange(len(slots), device=slots.device).unsqueeze(0),
            counts[row : row + 1],
            scale=operands.scale,
            implementation="reference",
        )
        deviations.append((out[row].double() - wanted[0]).norm() / wanted[0].norm())
    return float(torch.stack(deviations).max())
