"""LessIsMore (arXiv 2508.07101): one set for all heads, chosen at a few layers, with a stable recency window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import choose_for_groups, find_prefix_groups, groups_of_sets
from sgl_lim.methods.base import SharedSets
from sgl_lim.methods.ranked import Ranked


@dataclass(frozen=True)
class LessIsMore(Ranked):
    """Ranks candidates over all heads at each selection layer; later layers attend to that set.

    With scope "kv_head" each KV head has a set of its own, ranked over its query heads (as Kascade, arXiv 2512.16391,
    found better at small budgets), with the same sinks and window.
    """

    name = "lessismore"
    scopes = ("global", "kv_head")

    def share_sets(self, slots: Tensor, seq_lens: Tensor, granule: int) -> SharedSets | None:
        """The prefix groups of the rows that have to choose, with prefix selection by group."""
        if self.prefix_selection != "group" or slots.shape[1] <= self.budget:
            return None
        groups = find_prefix_groups(slots, torch.where(seq_lens > self.budget, seq_lens, 1), granule=granule)
        # Sets are shorter than what they are chosen from, and a part of a few tokens costs more than it saves.
        in_sets, counts = groups_of_sets(seq_lens, groups, self.sizes, smallest=max(1, granule // 4))
        return SharedSets(groups, in_sets, counts)

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `lim_kernels.choose_tokens`, and `choose_for_groups` for rows that choose together."""
        if shared is None:
            return super().choose(scores, seq_lens, slots)
        return choose_for_groups(
            scores,
            seq_lens,
            shared.groups,
            self.sizes,
            # The scores of rows are combined as those of ranks.
            combine=self.rank_reduction[self.aggregate],
            slots=slots,
        )
