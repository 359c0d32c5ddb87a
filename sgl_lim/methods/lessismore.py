"""LessIsMore (arXiv 2508.07101): one set for all heads, chosen at a few layers, with a stable recency window."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import choose_for_groups, choose_tokens, find_prefix_groups, groups_of_sets, score_tokens
from sgl_lim.methods.base import Method, Role, SharedSets


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

    def share_sets(self, slots: Tensor, seq_lens: Tensor, granule: int) -> SharedSets | None:
        """The prefix groups of the rows that have to choose, with prefix selection by group."""
        if self.prefix_selection != "group" or slots.shape[1] <= self.budget:
            return None
        groups = find_prefix_groups(slots, torch.where(seq_lens > self.budget, seq_lens, 1), granule=granule)
        # Sets are shorter than what they are chosen from, and a part of a few tokens costs more than it saves.
        in_sets, counts = groups_of_sets(
            seq_lens,
            groups,
            budget=self.budget,
            recent=self.recent,
            sinks=self.kept_sinks,
            smallest=max(1, granule // 4),
        )
        return SharedSets(groups, in_sets, counts)

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `lim_kernels.choose_tokens`, and `choose_for_groups` for rows that choose together."""
        if shared is None:
            return choose_tokens(
                scores, seq_lens, budget=self.budget, recent=self.recent, sinks=self.kept_sinks, slots=slots
            )
        return choose_for_groups(
            scores,
            seq_lens,
            shared.groups,
            budget=self.budget,
            recent=self.recent,
            sinks=self.kept_sinks,
            # The scores of rows are combined as those of ranks.
            combine=self.rank_reduction[self.aggregate],
            slots=slots,
        )
