"""What methods share that rank tokens at selection layers, and whose other layers attend to what was chosen there."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lim_kernels import SetSizes, adapt_budgets, choose_tokens, score_tokens
from sgl_lim.methods.base import Method, Role, SharedSets


@dataclass(frozen=True)
class Ranked(Method):
    """A set is sinks, the best-ranked candidates and a window, for all heads or for each KV head."""

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

    @property
    def sizes(self) -> SetSizes:
        """Sizes of a set, as the operators take them."""
        return SetSizes(self.budget, self.recent, self.kept_sinks)

    def role(self, layer: int) -> Role:
        """Selection layers choose, layers before the first are dense, all others are sparse."""
        if layer in self.selection_layers:
            return Role.SELECT
        return Role.DENSE if layer < self.selection_layers[0] else Role.SPARSE

    def score(
        self, logits: Tensor, seq_lens: Tensor, *, lse: Tensor, kv_heads: int, first_head: int, num_heads: int
    ) -> Tensor:
        """See `lim_kernels.score_tokens`; KV heads are ranked as if each were a row of its own."""
        sizes, how = self.sizes, self.aggregate
        if not self.per_kv_head:
            return score_tokens(
                logits, seq_lens, sizes, aggregate=how, lse=lse, first_head=first_head, num_heads=num_heads
            )
        batch = len(seq_lens)
        # [B * H_kv, H / H_kv, L], a view
        logits, lse = (tensor.unflatten(1, (kv_heads, -1)).flatten(0, 1) for tensor in (logits, lse))
        scores = score_tokens(logits, seq_lens.repeat_interleave(kv_heads), sizes, aggregate=how, lse=lse)
        return scores.unflatten(0, (batch, kv_heads))

    def own_sizes(self, scores: Tensor, seq_lens: Tensor) -> dict[str, Any]:
        """`budgets` and `recents` of rows of scores [R, L] for `choose_tokens`; none where all have the method's."""
        if self.top_p is None and not self.auto_recency:
            return {}
        budgets, recents = adapt_budgets(
            scores,
            seq_lens,
            self.sizes,
            find_recent=self.auto_recency,
            top_p=self.top_p,
            floor=self.top_p_floor,
        )
        return {"budgets": budgets, "recents": recents}

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `lim_kernels.choose_tokens`."""
        if not self.per_kv_head:
            return choose_tokens(scores, seq_lens, self.sizes, slots=slots, **self.own_sizes(scores, seq_lens))
        batch, kv_heads, length = scores.shape
        scores, lens = scores.flatten(0, 1), seq_lens.repeat_interleave(kv_heads)
        chosen, counts = (
            tensor.unflatten(0, (batch, kv_heads))
            for tensor in choose_tokens(scores, lens, self.sizes, **self.own_sizes(scores, lens))
        )
        if slots is None:
            return chosen, counts
        # No head has more tokens than the snapshot is wide, and a budget may be much wider.
        positions = chosen[:, :, :length].clamp(min=0).long()
        return slots.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, positions), counts
