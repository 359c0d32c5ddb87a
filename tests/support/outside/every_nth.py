"""A method that no file of sgl-lim knows: recent tokens, and every n-th one before them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_lim.methods.base import Budgeted, Role
from sgl_lim.methods.parameters import Whole, parameter


@dataclass(frozen=True)
class EveryNth(Budgeted):
    """The first layer is dense; all others attend to every n-th token and to the last ones."""

    name = "every-nth"

    stride: int = parameter(4, Whole(), "Of the tokens before the recent ones, every so many are kept, 25% with 4")

    def conflicts(self) -> list[str]:
        """Something has to be skipped."""
        if self.stride > 1:
            return super().conflicts()
        return [*super().conflicts(), "--lim-stride 1 skips nothing; raise it, or take --lim-method full"]

    def role(self, layer: int) -> Role:
        """Dense, then sparse."""
        return Role.SPARSE if layer else Role.DENSE

    def initial_set(self, seq_lens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """As many strided tokens as fit into half the budget, and the last ones."""
        ranks = torch.arange(min(self.budget, length), device=seq_lens.device)
        lens = seq_lens.unsqueeze(1).long()
        strided = torch.minimum(torch.full_like(lens, self.budget // 2), (lens - self.budget).clamp(min=0))
        strided = torch.minimum(strided, (lens - self.budget // 2) // self.stride)
        whole = torch.where(ranks < strided, ranks * self.stride, lens - self.budget + ranks)
        positions = torch.where(lens > self.budget, whole, torch.where(ranks < lens, ranks, -1))
        return positions.to(torch.int32), seq_lens.clamp(max=self.budget).to(torch.int32)
