"""What a candidate keeps of full attention, and the rule by which one is chosen."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgl_lim.calibrate.bench import ItemScore
from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.evaluate.measure import Share
from sgl_lim.programs.intervals import clustered_interval, standard_error, wilson_interval

POINTS = 2.0
"""Of 100 needles or chains that full attention has right, how many the choice may lose; one, if that is more."""
NATS = 0.3
"""How much of an answer's log-probability the choice may lose, mean over those that full attention has right."""
ALIKE = 0.0002
"""Divergences, in nats a token, that differ by less are alike."""
TELLS = 0.5
"""Of a task that full attention itself does worse, nothing is asked."""


@dataclass(frozen=True)
class Retrieval:
    """Needles or chains under a candidate, beside full attention."""

    items: int
    right: Share
    full: float
    """Share that full attention has right."""
    lost_nats: float
    """Log-probability of the right answer that is lost, mean over items that full attention has right."""

    @property
    def lost_points(self) -> float:
        """Of 100, how many fewer are right."""
        return 100 * (self.full - self.right.value)

    @property
    def keeps(self) -> bool:
        """Whether the rule allows what is lost."""
        allowed = max(POINTS, 100 / self.items) + 1e-9
        return self.lost_points <= allowed and self.lost_nats <= NATS


@dataclass(frozen=True)
class Outcome:
    """Figures of one candidate over some items."""

    candidate: Candidate
    tokens: int
    """Decoded tokens of text beyond the budget; of chains where there is no text."""
    divergence: float
    """KL(full attention || candidate) a token, in nats."""
    divergence_error: float | None
    """Its standard error over items."""
    agreement: Share
    by_suite: Mapping[str, float]
    """Agreement by kind of text."""
    retrieval: Mapping[str, Retrieval]
    """By task, of those that full attention can do."""

    @property
    def keeps(self) -> bool:
        """Whether the rule allows what is lost of needles and chains."""
        return all(one.keeps for one in self.retrieval.values())

    def measured(self) -> dict[str, object]:
        """For a preset file: builtins."""
        found: dict[str, object] = {
            "full_reads": self.candidate.full_reads,
            "tokens": self.tokens,
            "kl": round(self.divergence, 5),
            "agreement": round(self.agreement.value, 4),
            "agreement_interval": [round(self.agreement.low, 4), round(self.agreement.high, 4)],
        }
        for task, one in self.retrieval.items():
            found[task] = {"items": one.items, "right": round(one.right.value, 4), "dense_right": round(one.full, 4)}
        return found


def outcome(candidate: Candidate, scores: Sequence[ItemScore], full: Sequence[ItemScore]) -> Outcome:
    """Figures over items; `full` are the same items under full attention.

    Raises:
        ValueError: no decoded token is beyond the budget.
    """
    task = measured_task(scores)
    texts = [score for score in scores if score.task == task and score.tokens]
    tokens = sum(score.tokens for score in texts)
    if not tokens:
        raise ValueError("no decoded token lies beyond the budget")
    agreed = sum(score.agreed for score in texts) / tokens
    each = clustered_interval([score.agreed / score.tokens for score in texts], round(tokens / len(texts)))
    by_suite = {
        name: sum(s.agreed for s in texts if s.suite == name) / sum(s.tokens for s in texts if s.suite == name)
        for name in dict.fromkeys(score.suite for score in texts)
    }
    return Outcome(
        candidate,
        tokens,
        sum(score.divergence for score in texts) / tokens,
        standard_error([score.divergence / score.tokens for score in texts]),
        # The interval is that of the items' mean, and items may have different numbers of tokens.
        Share(agreed, min(agreed, (each or (agreed,))[0]), max(agreed, (each or (agreed,))[-1])),
        by_suite,
        {
            name: retrieval
            for name in dict.fromkeys(score.task for score in scores if score.task != "text")
            if (retrieval := _retrieval(name, scores, full)) is not None
        },
    )


def measured_task(scores: Sequence[ItemScore]) -> str:
    """The task whose divergence counts: text, or where the tokenizer knows none, chains."""
    return "text" if any(score.task == "text" for score in scores) else "chains"


def _retrieval(task: str, scores: Sequence[ItemScore], full: Sequence[ItemScore]) -> Retrieval | None:
    """None where full attention itself cannot do the task."""
    pairs = [(one, other) for one, other in zip(scores, full, strict=True) if one.task == task]
    can = statistics.fmean(other.whole for _, other in pairs)
    if can < TELLS:
        return None
    right = statistics.fmean(one.whole for one, _ in pairs)
    lost = statistics.fmean(other.log_probability - one.log_probability for one, other in pairs if other.whole)
    return Retrieval(len(pairs), Share.of(right, wilson_interval(right, len(pairs))), can, lost)


def choose(outcomes: Sequence[Outcome], reads: float) -> Outcome:
    """The rule: of what reads at most so many layers and keeps needles and chains, the one of least divergence.

    Of those that are within `ALIKE` of the least, the one that reads least. If none keeps needles and chains, the one
    that loses the least of them.

    Raises:
        ValueError: nothing reads so little.
    """
    within = [one for one in outcomes if one.candidate.full_reads <= reads + 1e-9]
    if not within:
        raise ValueError(f"no candidate reads at most {reads:g} full layers")
    kept = [one for one in within if one.keeps]
    if kept:
        least = min(one.divergence for one in kept)
        alike = [one for one in kept if one.divergence <= least + ALIKE]
        return min(alike, key=lambda one: (one.candidate.full_reads, one.divergence, one.candidate))
    return min(within, key=lambda one: (_most_lost(one), one.divergence, one.candidate.full_reads, one.candidate))


def _most_lost(one: Outcome) -> float:
    return max((retrieval.lost_nats for retrieval in one.retrieval.values()), default=0.0)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By increasing reads, what diverges less than all that read no more, of those that keep needles and chains."""
    found: list[Outcome] = []
    for one in sorted(outcomes, key=lambda o: (o.candidate.full_reads, o.divergence, o.candidate)):
        if one.keeps and (not found or one.divergence < found[-1].divergence):
            found.append(one)
    return found
