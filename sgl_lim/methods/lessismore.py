"""LessIsMore (arXiv 2508.07101): one set for all heads, chosen at a few layers, with a stable recency window."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import SetSizes, choose_for_groups, find_prefix_groups, groups_of_sets
from sgl_lim.methods.base import Keeping, SharedSets, beside_sinks
from sgl_lim.methods.parameters import Choice, Share, Switch, Whole, leave_one_out, parameter
from sgl_lim.methods.ranked import Ranked
from sgl_lim.methods.selection_layers import sinks_parameter

WIDEST_WINDOW = 0.5
"""Share of the budget that a window gets at most whose length follows the attention."""
_KEEPS_NOTHING = "selects nothing that could be kept"


@dataclass(frozen=True)
class LessIsMore(Ranked):
    """Ranks candidates over all heads at each selection layer; later layers attend to that set.

    With scope "kv_head" each KV head has a set of its own, ranked over its query heads (as Kascade, arXiv 2512.16391,
    found better at small budgets), with the same sinks and window.
    """

    name = "lessismore"

    recency: float | str = parameter(
        0.25,
        Share(metavar="{R,auto}", auto=True),
        "Share of the budget kept for recent tokens; auto: for each set, as large a share as these hold of the "
        "attention, from a sixteenth (32 tokens or a quarter, if more) to a half",
        missing="weighs no tokens for a window",
        missing_for=("auto",),
    )
    sinks: int = sinks_parameter()
    scope: str = parameter(
        "global",
        Choice(("global", "kv_head")),
        "One set for all heads, or one for each KV head, ranked over its query heads",
        missing="has one set for all heads",
    )
    prefix_selection: str = parameter(
        "request",
        Choice(("request", "group")),
        "Who chooses the tokens of a shared prefix: each request for itself, or all of a group together, so that "
        "sparse layers read them once as well",
        missing="selects nothing that rows could agree on",
    )
    selection_interval: int = parameter(
        1,
        Whole(beyond="no request has so many steps"),
        "Select every N-th decode step; in between a request's set is kept, its window moving along. Above 1, answers "
        "depend on what ran on their prefix before",
        missing=_KEEPS_NOTHING,
    )
    early_sets: bool = parameter(
        False,
        Switch(),
        "Layers before the first selection layer attend to its set of the step before. Answers then depend on what ran "
        "on their prefix before",
        missing=_KEEPS_NOTHING,
    )

    @property
    def per_kv_head(self) -> bool:
        """By scope."""
        return self.scope == "kv_head"

    @property
    def window_varies(self) -> bool:
        """With `--lim-recency auto`."""
        return self.recency == "auto"

    @property
    def sizes(self) -> SetSizes:
        """Middle floor(K (1 - r)); the rest is sinks and window, or window alone where it does not cover the sinks."""
        share = WIDEST_WINDOW if isinstance(self.recency, str) else self.recency
        rest = self.budget - math.floor(round(self.budget * (1 - share), 6))
        sinks = self.sinks if rest >= self.sinks else 0
        return SetSizes(budget=self.budget, recent=rest - sinks, sinks=sinks)

    @property
    def keeping(self) -> Keeping | None:
        """With a selection interval above 1, or early sets."""
        keeps = self.early_sets or self.selection_interval > 1
        return Keeping(self.selection_interval, self.early_sets) if keeps else None

    @property
    def needs_prefix_groups(self) -> str | None:
        """Rows that choose together are those of a prefix group."""
        return next(iter(self._group_flags()), None)

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
        # The scores of rows are combined as those of ranks.
        assert self.rank_reduction is not None
        return choose_for_groups(scores, seq_lens, shared.groups, self.sizes, combine=self.rank_reduction, slots=slots)

    def settings(self) -> dict[str, object]:
        """The sinks that sets have."""
        return {**super().settings(), "sinks": self.sizes.sinks}

    def conflicts(self) -> list[str]:
        """Sets of one size and for all heads are what outlives a step, and what rows choose together."""
        found = super().conflicts() + beside_sinks(self.budget, self.sinks)
        interval, early, group = self._interval_flags(), self._early_flags(), self._group_flags()
        adaptive = self._adaptive_flags()
        for kept in group:
            found += leave_one_out(adaptive, f"sizes each set by itself, not {kept}")
            for one in interval:
                found.append(
                    f"{kept}: requests that share a prefix select at different steps with {one}; leave one of them out"
                )
            for one in early:
                found.append(f"{one} keeps whole sets, and {kept} chooses smaller ones; leave one of them out")
        for kept in early + interval:
            found += leave_one_out(adaptive, f"makes sets of different sizes, and {kept} keeps them")
        if self.per_kv_head:
            found += leave_one_out(group + early + interval, "takes one set a request, not --lim-scope kv_head")
        if self.early_sets and self.selection_layers[:1] == (0,):
            found.append("--lim-early-sets on: no layer comes before --lim-selection-layers 0; leave the flag out")
        return found

    def flags_that_follow_writes(self) -> list[str]:
        """Sets that outlive a step hold positions of slots that nobody may write unseen."""
        return self._interval_flags() + self._early_flags()

    def _interval_flags(self) -> list[str]:
        """The flag of an interval above 1, as typed."""
        return [f"--lim-selection-interval {self.selection_interval}"] * (self.selection_interval > 1)

    def _early_flags(self) -> list[str]:
        """The flag of early sets, as typed, if they are on."""
        return ["--lim-early-sets on"] * self.early_sets

    def _group_flags(self) -> list[str]:
        """The flag by which rows choose together, as typed, if they do."""
        return ["--lim-prefix-selection group"] * (self.prefix_selection == "group")
