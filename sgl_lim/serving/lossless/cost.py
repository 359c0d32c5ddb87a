"""How many tokens a round drafts: from what passes cost on this machine, and from the drafts that were accepted.

A round of k drafts costs k draft steps and one verification, and answers (1 - a^(k + 1)) / (1 - a) tokens on average,
where a is the share of drafts that are accepted. k = 0 is a dense decode step. The choice is the host's, from lengths
that it knows, so that no step waits for the device.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

LEAST_GAIN = 1.03
"""Drafting has to win by so much over dense decode steps. Measured costs are not exact, and dense steps cannot lose."""
PRIOR, PRIOR_WEIGHT = 0.85, 64.0
"""What is assumed of acceptance before anything was drafted, and how many drafts that counts for."""
MEMORY = 2048.0
"""Acceptance is that of about the last so many drafts."""
_FADE = 1 / 8192
"""By so much acceptance returns to the prior with each dense step, so that drafting is tried again. A round that is
tried and fails lowers it by far more, so that about one in a hundred is tried where none pays."""


@dataclass(frozen=True)
class Measured:
    """What a pass took at a batch size: seconds by tokens of context in the batch, which increase."""

    rows: int
    points: tuple[tuple[float, float], ...]

    def at(self, tokens: float) -> float:
        """Seconds with so many tokens of context over all rows: on lines between the points, and beyond the last."""
        place = bisect_left([few for few, _ in self.points], tokens)
        if place == 0 or len(self.points) == 1:
            return self.points[0][1]
        (few, little), (many, much) = (
            self.points[place - 1 : place + 1] if place < len(self.points) else self.points[-2:]
        )
        return little + (much - little) * (tokens - few) / (many - few)


def rising(rows: int, points: Sequence[tuple[float, float]]) -> Measured:
    """Costs from measurements. A longer context costs no less, whatever a clock says."""
    highest = accumulate((seconds for _, seconds in points), max)
    return Measured(rows, tuple((tokens, seconds) for (tokens, _), seconds in zip(points, highest, strict=True)))


@dataclass(frozen=True)
class PassCost:
    """Cost of one kind of pass, by batch size; the points' rows increase."""

    points: tuple[Measured, ...]

    def seconds(self, rows: int, tokens: float) -> float:
        """Of a batch, between measured sizes in proportion, beyond the last one as its cost per row."""
        place = bisect_left([point.rows for point in self.points], rows)
        if place == len(self.points):
            return self.points[-1].at(tokens) * max(1.0, rows / self.points[-1].rows)
        above = self.points[place]
        if place == 0 or above.rows == rows:
            return above.at(tokens)
        below = self.points[place - 1]
        share = (rows - below.rows) / (above.rows - below.rows)
        return (1 - share) * below.at(tokens) + share * above.at(tokens)


@dataclass(frozen=True)
class RoundCosts:
    """Costs of all passes; `verify` by number of drafts."""

    draft: PassCost
    plain: PassCost
    verify: Mapping[int, PassCost]

    def seconds(self, drafts: int, rows: int, tokens: float) -> float:
        """A whole round of so many drafts."""
        if drafts == 0:
            return self.plain.seconds(rows, tokens)
        return drafts * self.draft.seconds(rows, tokens) + self.verify[drafts].seconds(rows, tokens)


@dataclass
class Acceptance:
    """The share of drafts that are accepted where the ones before them were."""

    accepted: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.accepted / self.tried

    def learn(self, correct: Iterable[int], drafts: int) -> None:
        """A round's accepted drafts by row, of so many."""
        for one in correct:
            self.accepted += one
            self.tried += min(one + 1, drafts)
        if self.tried > MEMORY:
            self.accepted *= MEMORY / self.tried
            self.tried = MEMORY

    def fade(self) -> None:
        """Nothing was drafted in a step."""
        self.accepted += _FADE * (PRIOR * self.tried - self.accepted)


def tokens_of(drafts: int, share: float) -> float:
    """Tokens that a round answers on average."""
    return float(sum(share**place for place in range(drafts + 1)))


@dataclass
class Chooser:
    """Decides how many tokens a round drafts.

    Args:
        counts: numbers of drafts to choose from, increasing; never empty.
        costs: None: nothing was measured, and every round drafts as many as it may.
        most_rows: larger batches do not draft: their logits would not fit.
    """

    counts: Sequence[int]
    costs: RoundCosts | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    most_rows: int | None = None

    def choose(self, rows: int, tokens: int) -> int:
        """Drafts of the next round, 0 for a dense step.

        Args:
            rows: requests in the batch; tokens: of context, over all of them.
        """
        if self.most_rows is not None and rows > self.most_rows:
            return 0
        if self.costs is None:
            return self.counts[-1]
        share = self.acceptance.share
        best, best_rate = 0, LEAST_GAIN / self.costs.seconds(0, rows, tokens)
        for drafts in self.counts:
            rate = tokens_of(drafts, share) / self.costs.seconds(drafts, rows, tokens)
            if rate > best_rate:
                best, best_rate = drafts, rate
        if best == 0:
            self.acceptance.fade()
        return best
