"""Ask many problems at once and record each one as it finishes. Knows no HTTP and no SGLang: it is given `ask`."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from sgl_lim.programs.graders import Grader
from sgl_lim.programs.grading import grade
from sgl_lim.programs.math_process import GradingStopped
from sgl_lim.programs.problems import Problem
from sgl_lim.programs.run_records import Generation, RecordFile, Row, Sample

_POLL_SECONDS = 0.2  # how soon a stop is noticed


class EndpointLost(RuntimeError):
    """The endpoint went away during the run."""


@dataclass(frozen=True)
class Invocation:
    """What this process itself did, without what an output file already held."""

    items: int
    output_tokens: int
    seconds: float  # from the first request to the last answer
    stopped: bool  # by `stop`, before the last problem


@dataclass(frozen=True)
class Asking:
    """How problems are asked."""

    ask: Callable[[str], list[Generation]]
    """Answers a prompt; runs in several threads."""
    concurrency: int
    """So many problems at a time."""
    is_alive: Callable[[], bool]
    """Whether the endpoint still answers; asked when a problem failed."""


@dataclass(frozen=True)
class _Asked:
    generations: list[Generation]
    seconds: float


@dataclass(frozen=True)
class _Grading:
    grader: Grader
    stopped: Callable[[], bool]


def run_items(
    problems: Sequence[Problem],
    *,
    asking: Asking,
    grader: Grader,
    records: RecordFile,
    stop: threading.Event,
    on_row: Callable[[Row], None],
) -> Invocation:
    """Ask `problems`, some at a time, and append a row for each as soon as it is answered.

    An item that fails gets a row with its error, and the run goes on. Grading happens in the calling thread. When
    `stop` is set, answered items are recorded and the rest, those in flight included, are left: threads that wait
    for the server outlive this call then. So is an item whose answers take long to compare.

    Raises:
        EndpointLost: an item failed and the endpoint is not alive; nothing is recorded for it.
    """
    remaining = iter(problems)
    pending: dict[Future[_Asked], Problem] = {}
    items = output_tokens = 0
    started = finished = time.monotonic()
    grading = _Grading(grader, stop.is_set)
    executor = ThreadPoolExecutor(asking.concurrency, thread_name_prefix="ask")
    try:
        while not stop.is_set():
            while len(pending) < asking.concurrency and (problem := next(remaining, None)) is not None:
                pending[executor.submit(_timed, asking.ask, problem.prompt)] = problem
            if not pending:
                break
            for future in wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                finished = time.monotonic()
                row = _row(pending[future], future, grading, records.settings, asking.is_alive)
                records.append(row)
                del pending[future]
                items += 1
                output_tokens += row.output_tokens
                on_row(row)
    except GradingStopped:
        pass  # its item is asked again by the run that resumes
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return Invocation(items, output_tokens, finished - started, stopped=items < len(problems))


def _timed(ask: Callable[[str], list[Generation]], prompt: str) -> _Asked:
    started = time.monotonic()
    return _Asked(ask(prompt), time.monotonic() - started)


def _row(
    problem: Problem,
    future: Future[_Asked],
    grading: _Grading,
    settings: Mapping[str, Any],
    is_alive: Callable[[], bool],
) -> Row:
    error = future.exception()
    if error is not None and not is_alive():
        raise EndpointLost(f"the endpoint went away: {error}") from error
    try:
        asked = future.result()
        graded = grade(problem, asked.generations, grading.grader, grading.stopped)
    except GradingStopped:
        raise
    except Exception as failure:
        return Row(problem.id, problem.answer, settings, seconds=0.0, error=f"{type(failure).__name__}: {failure}")
    samples = tuple(
        Sample(**asdict(generation), **asdict(sample))
        for generation, sample in zip(asked.generations, graded.samples, strict=True)
    )
    return Row(
        problem.id,
        problem.answer,
        settings,
        seconds=round(asked.seconds, 3),
        answer=graded.answer,
        correct=graded.correct,
        samples=samples,
    )
