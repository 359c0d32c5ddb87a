"""Sinks and recent tokens only (StreamingLLM, arXiv 2309.17453): the control without any selection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_lim.methods.base import Method, Role


@dataclass(frozen=True)
class Window(Method):
    """Same dense layers as `lessismore`; every layer from the first selection layer on sees sinks and window."""

    name = "window"

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
