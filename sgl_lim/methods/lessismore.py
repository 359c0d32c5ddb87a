"""LessIsMore (arXiv 2508.07101): one set for all heads, chosen at a few layers, with a stable recency window."""

import math
from dataclasses import dataclass

from torch import Tensor

from lim_kernels import choose_tokens, score_tokens
from sgl_lim.methods.base import Method, Role


@dataclass(frozen=True)
class LessIsMore(Method):
    """Ranks candidates over all heads at each selection layer; later layers attend to that set."""

    name = "lessismore"

    @property
    def middle(self) -> int:
        """Tokens chosen by rank: floor(K (1 - r))."""
        return math.floor(round(self.budget * (1 - self.recency), 6))

    @property
    def kept_sinks(self) -> int:
        """Sinks, or none where the recency share does not cover them."""
        return self.sinks if self.budget - self.middle >= self.sinks else 0

    @property
    def recent(self) -> int:
        """Length of the recency window."""
        return self.budget - self.middle - self.kept_sinks

    def role(self, layer: int) -> Role:
        """Selection layers choose, layers before the first are dense, all others are sparse."""
        if layer in self.selection_layers:
            return Role.SELECT
        return Role.DENSE if layer < self.selection_layers[0] else Role.SPARSE

    def score(self, logits: Tensor, seq_lens: Tensor, *, lse: Tensor, first_head: int, num_heads: int) -> Tensor:
        """See `lim_kernels.score_tokens`."""
        return score_tokens(
            logits,
            seq_lens,
            budget=self.budget,
            recent=self.recent,
            sinks=self.kept_sinks,
            aggregate=self.aggregate,
            first_head=first_head,
            num_heads=num_heads,
            lse=lse,
        )

    def choose(self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `lim_kernels.choose_tokens`."""
        return choose_tokens(
            scores, seq_lens, budget=self.budget, recent=self.recent, sinks=self.kept_sinks, slots=slots
        )
