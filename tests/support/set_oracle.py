"""The token sets of the methods that rank tokens and of the window control, by brute force in Python and float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SetRule:
    """The rule's parameters, as the flags give them."""

    method: str
    budget: int
    recency: float
    sinks: int
    aggregate: str
    scope: str = "global"
    attends: str = "context"
    """What selection layers attend to."""

    @property
    def middle(self) -> int:
        """Tokens chosen by rank: floor(K (1 - r)). The test's shares are exact enough for a plain floor."""
        return 0 if self.method == "window" else math.floor(self.budget * (1 - self.recency))

    @property
    def kept_sinks(self) -> int:
        """No sinks where the recency share does not cover them."""
        return self.sinks if self.budget - self.middle >= self.sinks else 0

    @property
    def recent(self) -> int:
        """Length of the recency window."""
        return self.budget - self.middle - self.kept_sinks

    def candidates(self, length: int) -> range:
        """Positions between sinks and window."""
        return range(self.kept_sinks, length - self.recent)

    def forced(self, length: int) -> list[int]:
        """Positions that are in every set of a row longer than the budget."""
        return [*range(self.kept_sinks), *range(length - self.recent, length)]

    def choose(self, logits: Tensor, length: int) -> list[int]:
        """Ascending positions for one row: logits float64 [H, >= length]; equal scores go to the lower position."""
        if length <= self.budget:
            return list(range(length))
        rows = logits[:, :length].double()
        chosen = self._union(rows.tolist(), length) if self.aggregate == "union" else self._best(rows, length)
        return sorted([*self.forced(length), *chosen])

    def window(self, length: int) -> list[int]:
        """The set without any selection."""
        return list(range(length)) if length <= self.budget else sorted(self.forced(length))

    def _union(self, rows: list[list[float]], length: int) -> list[int]:
        lists = [sorted(self.candidates(length), key=lambda t, row=row: (-row[t], t))[: self.middle] for row in rows]
        union = dict.fromkeys(ranked[rank] for rank in range(self.middle) for ranked in lists)
        return list(union)[: self.middle]

    def _best(self, rows: Tensor, length: int) -> list[int]:
        scores = self.scores(rows).tolist()
        return sorted(self.candidates(length), key=lambda t: (-scores[t], t))[: self.middle]

    def scores(self, rows: Tensor) -> Tensor:
        """Max or sum over heads of the softmax over the whole row: [H, L] → [L]."""
        weights = rows.softmax(dim=1)
        return weights.sum(dim=0) if self.aggregate == "sum" else weights.amax(dim=0)

    def explains(self, served: Sequence[int], logits: Tensor, length: int, error: Tensor) -> bool:
        """Whether logits within `error` [H, L] of `logits` can have led to the set `served`.

        Each token's place in the order is an interval; no token left out may lie surely before one that was kept.
        """
        if list(served) == self.choose(logits, length):
            return True
        kept = set(served)
        if len(kept) != self.budget or not kept.issuperset(self.forced(length)):
            return False
        low, high = self.places(logits[:, :length].double(), error[:, :length].double(), length)
        candidates = set(self.candidates(length))
        worst_kept = max(low[t] for t in candidates & kept)
        return worst_kept <= min(high[t] for t in candidates - kept)

    def places(self, rows: Tensor, error: Tensor, length: int) -> tuple[list[float], list[float]]:
        """First and last place each token may have; a smaller place is chosen first."""
        if self.aggregate != "union":
            # A logit's error moves a weight by its exponential, and again through the row's normaliser.
            relative = torch.expm1(2 * error.max()) + 16 * torch.finfo(torch.float32).eps
            scores = self.scores(rows)
            return (-scores * (1 + relative)).tolist(), (-scores * (1 - relative)).tolist()
        inside = slice(self.kept_sinks, length - self.recent)
        low, high = [math.inf] * length, [math.inf] * length
        heads = rows.shape[0]
        for head in range(heads):
            values, slack = rows[head, inside], error[head, inside]
            surely = (values[None, :] - slack[None, :] > values[:, None] + slack[:, None]).sum(dim=1)
            possibly = (values[None, :] + slack[None, :] >= values[:, None] - slack[:, None]).sum(dim=1) - 1
            for offset, (first, last) in enumerate(zip(surely.tolist(), possibly.tolist(), strict=True)):
                t = offset + self.kept_sinks
                low[t] = min(low[t], first * heads + head)
                high[t] = min(high[t], last * heads + head)
        return low, high
