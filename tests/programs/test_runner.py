"""Running items: recording at once, concurrency, errors, stopping. No server and no SGLang."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sgl_lim.programs.graders import Answer, ChainGrader
from sgl_lim.programs.math_process import GradingStopped
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_records import Generation, RecordFile, Row
from sgl_lim.programs.runner import Asking, EndpointLost, Invocation, run_items

PROBLEMS = chain_problems(6, num_facts=6, num_steps=2, seed=0).problems
SOLUTION = {problem.prompt: str(problem.solution) for problem in PROBLEMS}


def generation(text: str) -> Generation:
    return Generation(text, 20, len(text.split()), 10, "stop")


def right(prompt: str) -> list[Generation]:
    return [generation(SOLUTION[prompt])]


class BrokenGrader(ChainGrader):
    def extract(self, generation: Generation) -> Answer | None:
        if generation.text == "x":
            raise ZeroDivisionError("broken")
        return super().extract(generation)


class Run:
    """`run_items` over a fresh file, with what it was called with and what came of it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.stop = threading.Event()
        self.rows: list[Row] = []
        self.lines_seen: list[int] = []
        self.alive = True
        self.grader = ChainGrader()

    def __call__(self, ask: Any, *, concurrency: int = 2, problems: Any = PROBLEMS) -> Invocation:
        with RecordFile(self.path, self.settings) as records:
            return run_items(
                problems,
                asking=Asking(ask, concurrency, lambda: self.alive),
                grader=self.grader,
                records=records,
                stop=self.stop,
                on_row=self.on_row,
            )

    def on_row(self, row: Row) -> None:
        self.rows.append(row)
        self.lines_seen.append(self.path.read_bytes().count(b"\n"))

    def recorded(self) -> dict[str, Row]:
        with RecordFile(self.path, self.settings) as records:
            return records.rows


@pytest.fixture
def run(tmp_path: Path, settings: dict[str, Any]) -> Run:
    return Run(tmp_path / "out.jsonl", settings)


def test_each_item_is_recorded_before_it_is_shown(run: Run) -> None:
    invocation = run(right)
    assert run.lines_seen == [1, 2, 3, 4, 5, 6]
    assert invocation.items == 6 and not invocation.stopped
    assert invocation.output_tokens == sum(len(solution.split()) for solution in SOLUTION.values())
    assert set(run.recorded()) == {problem.id for problem in PROBLEMS}
    assert all(row.correct and row.samples[0].whole_chain for row in run.recorded().values())


@pytest.mark.parametrize("concurrency", [1, 3, 6, 50])
def test_as_many_in_flight_as_asked(run: Run, concurrency: int) -> None:
    lock, now, most = threading.Lock(), 0, 0
    expected = min(concurrency, len(PROBLEMS))
    together = threading.Barrier(expected)

    def ask(prompt: str) -> list[Generation]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(timeout=30)
        with lock:
            now -= 1
        return right(prompt)

    run(ask, concurrency=concurrency)
    assert most == expected


def test_a_failing_item_is_recorded_and_the_rest_goes_on(run: Run) -> None:
    def ask(prompt: str) -> list[Generation]:
        if prompt == PROBLEMS[1].prompt:
            raise RuntimeError("prompt too long")
        return right(prompt)

    assert run(ask).items == 6
    rows = run.recorded()
    assert rows[PROBLEMS[1].id].error == "RuntimeError: prompt too long"
    assert sum(row.error is None for row in rows.values()) == 5


def test_an_answer_that_cannot_be_graded_is_an_error_of_its_item(run: Run) -> None:
    def ask(prompt: str) -> list[Generation]:
        return [generation("x")] if prompt == PROBLEMS[0].prompt else right(prompt)

    run.grader = BrokenGrader()
    assert run(ask).items == 6
    assert run.recorded()[PROBLEMS[0].id].error == "ZeroDivisionError: broken"
    assert sum(row.error is None for row in run.recorded().values()) == 5


def test_a_lost_endpoint_ends_the_run_and_leaves_no_errors_behind(run: Run) -> None:
    asked = 0

    def ask(prompt: str) -> list[Generation]:
        nonlocal asked
        asked += 1
        if asked > 2:
            run.alive = False
            raise ConnectionError("refused")
        return right(prompt)

    with pytest.raises(EndpointLost, match="refused"):
        run(ask, concurrency=1)
    assert asked == 3
    assert len(run.recorded()) == 2 and all(row.error is None for row in run.recorded().values())


def test_stopping_keeps_what_is_answered_and_does_not_wait(run: Run) -> None:
    release, answered_late = threading.Event(), threading.Event()

    def ask(prompt: str) -> list[Generation]:
        if prompt != PROBLEMS[0].prompt:
            run.stop.set()
            release.wait(timeout=60)
            answered_late.set()
        return right(prompt)

    invocation = run(ask, concurrency=2)
    assert invocation.stopped and not answered_late.is_set()
    release.set()
    assert len(run.recorded()) == invocation.items <= 1


def test_stopping_between_items_is_a_stop_too(run: Run) -> None:
    def ask(prompt: str) -> list[Generation]:
        run.stop.set()
        return right(prompt)

    invocation = run(ask, concurrency=1)
    assert invocation.stopped and invocation.items <= 1


def test_a_stop_while_answers_are_compared_leaves_their_item_to_the_next_run(run: Run) -> None:
    class Slow(ChainGrader):
        def same(self, one: Answer, other: Answer) -> bool:
            run.stop.set()
            raise GradingStopped

    run.grader = Slow()
    invocation = run(right, concurrency=1)
    assert invocation.stopped and invocation.items == 0 and run.recorded() == {}


def test_several_samples_are_voted_on(run: Run) -> None:
    problem = PROBLEMS[0]
    wrong = f"answer {(int(problem.answer) + 1) % 100}"
    run(lambda prompt: [generation(text) for text in (wrong, *[SOLUTION[prompt]] * 2)], problems=[problem])
    row = run.recorded()[problem.id]
    assert row.correct and [sample.correct for sample in row.samples] == [False, True, True]


def test_nothing_to_do(run: Run) -> None:
    invocation = run(right, problems=[])
    assert (invocation.items, invocation.output_tokens, invocation.stopped) == (0, 0, False)


def test_problems_are_asked_in_order(run: Run) -> None:
    prompts: list[str] = []

    def ask(prompt: str) -> list[Generation]:
        prompts.append(prompt)
        return right(prompt)

    run(ask, concurrency=1)
    assert prompts == [problem.prompt for problem in PROBLEMS]
