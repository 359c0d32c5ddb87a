"""Sinks and recent tokens only (StreamingLLM, arXiv 2309.17453): the control without any selection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_lim.methods.base import Budgeted, Role, beside_sinks
from sgl_lim.methods.selection_layers import selection_layers_parameter, sinks_parameter


@dataclass(frozen=True)
class Window(Budgeted):
    """Same dense layers as LessIsMore; every layer from the first selection layer on sees sinks and window."""

    name = "window"

    sinks: int = sinks_parameter()
    selection_layers: tuple[int, ...] = selection_layers_parameter()

    def conflicts(self) -> list[str]:
        """Something has to be left for the window."""
        return super().conflicts() + beside_sinks(self.budget, self.sinks)

    def role(self, layer: int) -> Role:
        """Dense before the first selection layer, sparse from it on."""
        return Role.DENSE if layer < self.selection_layers[0] else Role.SPARSE

    def initial_set(self, seq_lens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Positions 0 … sinks-1 and the last budget-sinks; rows within the budget keep all their positions."""
        # A budget may be much wider than any row.
        ranks = torch.arange(min(self.budget, length), device=seq_lens.device)
        skipped = (seq_lens.unsqueeze(1) - self.budget).clamp(min=0)
        positions = torch.where(ranks < self.sinks, ranks, ranks + skipped)
        positions = positions.masked_fill(positions >= seq_lens.unsqueeze(1), -1)
        return positions.to(torch.int32), seq_lens.clamp(max=self.budget).to(torch.int32)
