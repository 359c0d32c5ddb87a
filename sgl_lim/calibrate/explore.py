"""The search: coverage proposes, the model decides, and what it decided says what to try next.

1. Of the candidates that cover most, and of spaced ones, some are decoded on the quick part.
2. The weights of layers are fitted to what came out; the best candidates by the fit, and neighbours of the best that
   were tried, are decoded too. This is repeated.
3. So is what attends otherwise, and the best of all are decoded on the whole search part.
4. On the whole search part, which tells more apart, the best are refined: their neighbours are decoded there too.

All numbers are counts, none are times, so equal commands try equal candidates.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sgl_lim.calibrate.bench import ItemScore, Part
from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.outcome import Outcome, outcome
from sgl_lim.calibrate.search import Model, Recall, neighbours, spaced, swaps
from sgl_lim.methods import Method

Build = Callable[[Candidate], Method]
SLACK = 1.0
"""Layers that may be read beyond the limit while searching: what they would buy is told."""
_FRONTIER = 0.5
"""Layers read whole: candidates are compared within steps of this size."""


@dataclass(frozen=True)
class Effort:
    """How many candidates are tried."""

    first: int
    """By coverage, and as many spaced ones at most as half of it."""
    rounds: int
    each: int
    """In a round, by the fit; and half as many neighbours, and in the end as many that attend otherwise."""
    finalists: int
    """On the whole search part."""
    refine: int
    """Rounds in which neighbours of the best are decoded on the whole search part, half as many as in other rounds."""

    @property
    def quick(self) -> int:
        """Candidates that are tried at most, beside references."""
        return self.first + self.first // 2 + self.rounds * (self.each + self.each // 2) + self.each // 2 + self.refined

    @property
    def refined(self) -> int:
        """Of these, candidates that are decoded as neighbours of finalists, at most."""
        return self.refine * (self.each // 2)


@dataclass(frozen=True)
class Space:
    """What may be tried."""

    depth: int
    max_dense: int
    reads: float
    """Layers read whole, at most, in what may be chosen."""
    attends: tuple[str, ...]

    def most(self, attends: str) -> int:
        """Selection layers at most."""
        return max(1, min(self.depth - 1, int((self.reads + SLACK) / (0.5 if attends == "set" else 1.0))))

    def affords(self, one: Candidate) -> bool:
        """Whether it may be chosen."""
        return self.has(one) and one.full_reads <= self.reads + 1e-9

    def has(self, one: Candidate) -> bool:
        """Whether it reads little enough, and leaves a sparse layer."""
        last = one.layers[-1] < self.depth and one.layers[0] + len(one.layers) < self.depth
        return one.full_reads <= self.reads + SLACK + 1e-9 and one.layers[0] <= self.max_dense and last


@dataclass
class Trials:
    """Scores by candidate and part, each decoded once."""

    parts: Mapping[int, Part]
    build: Build
    scores: dict[tuple[Candidate, int], list[ItemScore]] = field(default_factory=dict)
    full: dict[int, list[ItemScore]] = field(default_factory=dict)

    def outcome(self, candidate: Candidate, parts: Sequence[int]) -> Outcome:
        """Over some parts, decoded where they were not."""
        found: list[ItemScore] = []
        full: list[ItemScore] = []
        for part in parts:
            if part not in self.full:
                self.full[part] = self.parts[part].full
            if (candidate, part) not in self.scores:
                self.scores[candidate, part] = self.parts[part].score(self.build(candidate))
            found += self.scores[candidate, part]
            full += self.full[part]
        return outcome(candidate, found, full)

    def tried(self, part: int) -> list[Candidate]:
        """Candidates that a part was decoded with, in order."""
        return [candidate for candidate, of in self.scores if of == part]


QUICK, SEARCH = (0,), (0, 1)


def explore(
    trials: Trials, recall: Recall, space: Space, effort: Effort, references: Sequence[Candidate]
) -> list[Outcome]:
    """Outcomes of the finalists and of the references on the search parts."""
    model = Model.by_depth(recall)
    for candidate in references:
        trials.outcome(candidate, QUICK)
    main = space.attends[0]
    wide = [one for one in spaced(space.depth, space.max_dense, main) if space.has(one)]
    _try(trials, _spread(_proposed(model, space, main), model, effort.first))
    _try(trials, _spread(wide, model, effort.first // 2))
    for _ in range(effort.rounds):
        model = model.fitted((one, trials.outcome(one, QUICK).divergence) for one in trials.tried(0))
        new = [one for one in _proposed(model, space, main) if (one, 0) not in trials.scores]
        _try(trials, _spread(new, model, effort.each))
        near = [one for one in _near(trials, space) if (one, 0) not in trials.scores]
        _try(trials, sorted(near, key=lambda one: (model.expected(one), one))[: effort.each // 2])
    for attends in space.attends[1:]:
        # What attends otherwise is tried once the weights are known.
        _try(trials, _spread(_proposed(model, space, attends), model, effort.each // 2))
    best = _finalists([trials.outcome(one, QUICK) for one in trials.tried(0)], effort.finalists, space.reads)
    for one in dict.fromkeys([*references, *best]):
        trials.outcome(one, SEARCH)
    for _ in range(effort.refine):
        _refine(trials, space, model, effort.each // 2)
    return [trials.outcome(one, SEARCH) for one in trials.tried(1)]


def _refine(trials: Trials, space: Space, model: Model, count: int) -> None:
    """Decode so many neighbours of the two best finalists on the search parts, the most promising by the fit."""
    done = {one: trials.outcome(one, SEARCH) for one in trials.tried(1)}
    model = model.fitted((one, found.divergence) for one, found in done.items())
    # Several finalists may be nearly the same, so what the best two have in common is not tried twice.
    near = dict.fromkeys(
        new
        for one in _finalists(list(done.values()), 2, space.reads)
        for new in [*neighbours(one, space.depth, space.max_dense), *swaps(one, space.depth)]
        if space.affords(new) and new not in done
    )
    for one in sorted(near, key=lambda one: (model.expected(one), one))[:count]:
        trials.outcome(one, SEARCH)


def _try(trials: Trials, candidates: Iterable[Candidate]) -> None:
    for one in candidates:
        trials.outcome(one, QUICK)


def _proposed(model: Model, space: Space, attends: str) -> list[Candidate]:
    found = model.best(attends, dense=range(space.max_dense + 1), most=space.most(attends))
    return [one for one in found if space.has(one)]


def _near(trials: Trials, space: Space) -> list[Candidate]:
    """Neighbours of the best that was tried."""
    done = [trials.outcome(one, QUICK) for one in trials.tried(0)]
    best = _finalists([one for one in done if space.has(one.candidate)], 2, space.reads)
    return [near for one in best for near in neighbours(one, space.depth, space.max_dense) if space.has(near)]


def _spread(candidates: Sequence[Candidate], model: Model, count: int) -> list[Candidate]:
    """So many, the best by expectation at each level of reads in turn, from what reads most on."""
    levels: dict[float, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda one: (model.expected(one), one)):
        levels.setdefault(one.full_reads // _FRONTIER, []).append(one)
    found: list[Candidate] = []
    while len(found) < count and any(levels.values()):
        for level in sorted(levels, reverse=True):
            if levels[level] and len(found) < count:
                found.append(levels[level].pop(0))
    return found


def _finalists(outcomes: Sequence[Outcome], count: int, reads: float) -> list[Candidate]:
    """Half of them the best that read little enough, the others the best of each level of reads."""
    ranked = sorted(
        (one for one in outcomes if one.candidate.full_reads <= reads + 1e-9),
        key=lambda one: (not one.keeps, one.divergence, one.candidate),
    )
    found = [one.candidate for one in ranked[: (count + 1) // 2]]
    levels: dict[float, Candidate] = {}
    for one in ranked:
        levels.setdefault(one.candidate.full_reads // _FRONTIER, one.candidate)
    rest = [levels[level] for level in sorted(levels, reverse=True)]
    return list(dict.fromkeys([*found, *rest]))[:count]
