"""One calibration: its sizes, its parts one after another, and what it finds for each budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_lim.calibrate import coverage, material
from sgl_lim.calibrate.bench import Part, work
from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.continuations import continued
from sgl_lim.calibrate.explore import Effort, Space, Trials, explore
from sgl_lim.calibrate.material import Counts, Sizes
from sgl_lim.calibrate.options import Options
from sgl_lim.calibrate.outcome import Outcome, choose, frontier
from sgl_lim.calibrate.search import Recall
from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.items import Suite
from sgl_lim.evaluate.progress import Progress
from sgl_lim.methods.ranked import Ranked
from sgl_lim.settings.config import LimConfig, RefusedConfig
from sgl_lim.settings.layers import SPACED_ATTENDS, spaced_layers
from sgl_lim.settings.presets import find_preset

_FRONTIER = 5
"""Points of the frontier that are measured on what was held out."""


@dataclass(frozen=True)
class Scale:
    """How much a device is given to do."""

    context: int
    decoded: int
    rows: int
    counts: tuple[Counts, Counts, Counts]
    effort: Effort


ON_CPU = Scale(
    context=1536,
    decoded=96,
    rows=64,
    counts=(
        Counts(windows=1, others=0, facts=1, alike=0, chains=2),
        Counts(windows=2, others=1, facts=1, alike=1, chains=4),
        Counts(windows=3, others=1, facts=2, alike=1, chains=6),
    ),
    effort=Effort(first=12, rounds=3, each=6, finalists=8, refine=0),
)
ON_GPU = Scale(
    context=4096,
    decoded=192,
    rows=1024,
    counts=(
        Counts(windows=2, others=1, facts=3, alike=1, chains=4),
        Counts(windows=4, others=2, facts=6, alike=4, chains=8),
        Counts(windows=6, others=2, facts=8, alike=6, chains=12),
    ),
    effort=Effort(first=24, rounds=6, each=10, finalists=14, refine=4),
)


@dataclass(frozen=True)
class Job:
    """A command line, resolved for a model and a device."""

    rule: LimConfig
    budgets: tuple[int, ...]
    space: Space
    scale: Scale
    sizes: Sizes
    max_tokens: int
    references: dict[str, Candidate]
    """By name, what a server takes that finds no calibration."""

    def method(self, candidate: Candidate, budget: int) -> Ranked:
        """As a server would build it."""
        method = self.rule.build(budget=budget, selection_layers=candidate.layers, selection_attends=candidate.attends)
        assert isinstance(method, Ranked)
        return method


@dataclass(frozen=True)
class Result:
    """What was found for one budget."""

    budget: int
    recall: Recall
    quick: tuple[Outcome, ...]
    """All candidates, on the quick part."""
    searched: tuple[Outcome, ...]
    """Finalists and references, on the parts that were searched on."""
    chosen: Outcome
    """On what was held out, as all that follow."""
    named: dict[str, Outcome]
    """References and what one more or one less would buy, by name."""
    frontier: tuple[Outcome, ...]


def prepare(options: Options, config: Any) -> Job:
    """Resolve a command line against a model's configuration.

    Raises:
        ValueError: the model has too few layers or positions, or a budget is no smaller than the context.
        RefusedConfig: a budget does not go with the rule.
    """
    text = config.get_text_config()
    depth, longest = text.num_hidden_layers, text.max_position_embeddings
    if depth < 2:
        raise ValueError(f"--model-path {options.model_path}: has {depth} layer, and no other could read its set")
    scale = ON_CPU if options.device == "cpu" else ON_GPU
    context = options.context or min(scale.context, longest)
    if context > longest:
        raise ValueError(f"--context {context}: the model has positions for {longest} tokens; lower it")
    budgets = options.budgets or (context // 8,)
    if budgets[-1] * 2 > context:
        raise ValueError(
            f"--budgets {budgets[-1]}: more than half of --context {context}, where hardly anything is sparse; lower "
            "it or raise --context"
        )
    spaced = Candidate(spaced_layers(depth), SPACED_ATTENDS)
    reads = spaced.full_reads if options.reads is None else options.reads
    least = min(Candidate((0,), attends).full_reads for attends in options.attends)
    if reads < least:
        raise ValueError(f"--reads {reads:g}: one selection layer counts {least:g}; raise it")
    max_dense = min(depth // 3 if options.max_dense is None else options.max_dense, int(reads))
    references = {"spaced default": spaced}
    if (preset := find_preset(options.model_path, depth)) is not None:
        references[f"preset {preset.name}"] = Candidate(preset.selection_layers, "context")
    job = Job(
        rule=options.rule,
        budgets=budgets,
        space=Space(depth, max_dense, reads, options.attends),
        scale=scale,
        sizes=Sizes(context, min(scale.decoded, context // 8), options.seed, scale.counts),
        max_tokens=options.max_tokens,
        references=references,
    )
    problems = [problem for budget in budgets for problem in job.method(spaced, budget).conflicts()]
    if problems:
        raise RefusedConfig(problems)
    return job


def calibrate(job: Job, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> list[Result]:
    """A result for each budget."""
    suites = material.built_in(checkpoint, job.sizes, chains=_does_chains(checkpoint, job))
    progress = Progress(_work(job, suites, prompts))
    try:
        progress.say(_announced(job, suites, prompts))
        if prompts:
            progress.begin("continuing your prompts")
            items = continued(checkpoint, prompts, tokens=job.max_tokens, done=progress.add)
            suites = material.with_prompts(suites, items)
        return _Run(job, checkpoint, suites, progress).results()
    finally:
        progress.close()


def _does_chains(checkpoint: Checkpoint, job: Job) -> bool:
    suite = material.easy_chains(checkpoint, job.sizes)
    if suite is None:
        return False
    return any(score.whole for score in Part(checkpoint, [suite], rows=job.scale.rows, done=lambda _: None).full)


class _Run:
    """The stages of a calibration."""

    def __init__(self, job: Job, checkpoint: Checkpoint, suites: Sequence[Sequence[Suite]], progress: Progress) -> None:
        self._job, self._checkpoint, self._suites, self._progress = job, checkpoint, suites, progress
        self._parts: dict[int, Part] = {}

    def results(self) -> list[Result]:
        """Search with each budget, then measure with each what was chosen."""
        job, progress = self._job, self._progress
        self._begin("reading prompts", (0, 1))
        trials, recalls, searched = {}, {}, {}
        for budget in job.budgets:
            progress.begin(f"searching, budget {budget}")
            trials[budget] = Trials(self._parts, lambda one, budget=budget: job.method(one, budget))  # type: ignore[misc]
            part = self._parts[0]
            recalls[budget] = coverage.record(
                self._checkpoint, part.pool, part.rows, job.method(Candidate((0,), "context"), budget)
            )
            references = list(job.references.values())
            searched[budget] = explore(trials[budget], recalls[budget], job.space, job.scale.effort, references)
        # What was searched on makes room for what was held out.
        self._parts.clear()
        self._begin("reading what was held out", (2,))
        found = []
        for budget in job.budgets:
            progress.begin(f"measuring the choice, budget {budget}")
            found.append(self._result(budget, trials[budget], recalls[budget], searched[budget]))
        return found

    def _begin(self, what: str, parts: Sequence[int]) -> None:
        self._progress.begin(what)
        for part in parts:
            self._parts[part] = Part(
                self._checkpoint, self._suites[part], rows=self._job.scale.rows, done=self._progress.add
            )

    def _result(self, budget: int, trials: Trials, recall: Recall, searched: list[Outcome]) -> Result:
        quick = tuple(trials.outcome(one, (0,)) for one in trials.tried(0))
        best = choose(searched, self._job.space.reads).candidate
        points = _thinned([one.candidate for one in frontier(searched)], best)
        named = {**self._job.references, **_variants(best, quick)}
        measured = {one: trials.outcome(one, (2,)) for one in dict.fromkeys([best, *named.values(), *points])}
        return Result(
            budget,
            recall,
            quick,
            tuple(searched),
            measured[best],
            {name: measured[one] for name, one in named.items()},
            tuple(measured[one] for one in points),
        )


def _variants(best: Candidate, tried: Sequence[Outcome]) -> dict[str, Candidate]:
    """The best that were tried with one selection or one dense layer more or less."""
    dense, selections = best.layers[0], len(best.layers)
    found = {}
    for name, one, other in (
        ("one more selection", dense, selections + 1),
        ("one selection less", dense, selections - 1),
        ("one more dense layer", dense + 1, selections),
        ("one dense layer less", dense - 1, selections),
    ):
        alike = [
            outcome
            for outcome in tried
            if (outcome.candidate.layers[0], len(outcome.candidate.layers)) == (one, other)
            and outcome.candidate.attends == best.attends
        ]
        if alike:
            found[name] = min(alike, key=lambda o: (o.divergence, o.candidate)).candidate
    return found


def _thinned(points: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    """A few of them, evenly spaced, the choice among them."""
    if len(points) > _FRONTIER:
        points = [points[n * (len(points) - 1) // (_FRONTIER - 1)] for n in range(_FRONTIER)]
    return sorted({*points, best}, key=lambda one: (one.full_reads, one))


def _work(job: Job, suites: Sequence[Sequence[Suite]], prompts: Sequence[Sequence[int]]) -> int:
    """About what all of it costs, in decoded tokens."""
    (quick_prompts, quick), (search_prompts, search), (held_prompts, held) = (work(part) for part in suites)
    effort = job.scale.effort
    references = len(job.references)
    a_budget = (effort.quick + references + 2) * quick
    a_budget += (effort.finalists + effort.refined + references) * search
    a_budget += (references + 4 + _FRONTIER) * held
    own = sum(len(prompt) // 3 + job.max_tokens for prompt in prompts)
    # The dense passes are one of each part.
    once = quick_prompts + search_prompts + held_prompts + quick + search + held
    return once + own + len(job.budgets) * a_budget


def _announced(job: Job, suites: Sequence[Sequence[Suite]], prompts: Sequence[Sequence[int]]) -> str:
    items = sum(len(suite.items) for part in suites for suite in part) + len(prompts)
    budgets = ", ".join(map(str, job.budgets))
    return (
        f"{items} items of up to {job.sizes.context} tokens, budget {budgets}: about {job.scale.effort.quick} choices "
        f"of layers are tried, {_work(job, suites, prompts):,} tokens to decode"
    )
