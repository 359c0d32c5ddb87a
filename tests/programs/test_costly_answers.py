"""Answers that nobody should compute: bounded, interruptible, and compared by their spelling."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.grading import COSTLY, FORMS, accepted, generation, misread
from sgl_lim.programs.graders import GradingError
from sgl_lim.programs.grading import grade
from sgl_lim.programs.math_grading import MathGrader
from sgl_lim.programs.math_process import GradingStopped, MathProcess
from sgl_lim.programs.problems import Problem
from sgl_lim.programs.run_records import Generation

ANSWERS = [
    "204",
    "-2 + 7i",
    r"\frac{14}{3}",
    r"\left( 3, \frac{\pi}{2} \right)",
    r"\text{Evelyn}",
    r"4210_{5}",
    r"3\sqrt{13}",
]
"""A few, one of a kind."""


def problem(answer: str) -> Problem:
    return Problem("p", "?", answer, "math")


def boxes(texts: list[str]) -> list[Generation]:
    return [generation(f"\\boxed{{{text}}}") for text in texts]


def test_towers_cost_next_to_nothing_and_equal_their_own_spelling(math_grader: MathGrader) -> None:
    towers = [f"{base}^{{{base}^{{{base}}}}}" for base in range(8, 40)]
    graded = grade(problem(towers[3]), boxes([*towers, towers[3]]), math_grader)
    assert [index for index, sample in enumerate(graded.samples) if sample.correct] == [3, 32]
    assert graded.correct and graded.answer == towers[3]
    assert all(sample.by_spelling for sample in graded.samples if not sample.correct)


def test_what_is_costly_in_any_way_leaves_the_other_samples_their_grades(math_grader: MathGrader) -> None:
    graded = grade(problem(r"\frac{\pi}{2}"), boxes([*COSTLY, r"0.5\pi", "pi/2"]), math_grader)
    assert [sample.correct for sample in graded.samples] == [False] * len(COSTLY) + [True, True]
    assert graded.correct and not graded.samples[-1].by_spelling


def test_many_different_formulas_are_all_read(math_grader: MathGrader) -> None:
    texts = [f"{a}x^2+{b}xy+\\sin({c}x)" for a in range(2, 6) for b in range(2, 6) for c in range(2, 6)]
    graded = grade(problem(r"\sin(3x)+x(5x+4y)"), boxes(texts), math_grader)
    assert [text for text, sample in zip(texts, graded.samples, strict=True) if sample.correct] == [texts[57]]
    assert not any(sample.by_spelling for sample in graded.samples)


def test_a_slow_machine_changes_no_grade(math_grader: MathGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, moments = math_grader._process.ask, 0

    def moments_are_too_short(
        request: dict[str, Any], seconds: float, stopped: Callable[[], bool]
    ) -> dict[str, Any] | None:
        nonlocal moments
        if seconds < 0.2:
            moments += 1
            time.sleep(0.03)  # the last answer is read after more than four seconds
            return None
        return ask(request, 10 * seconds, stopped)

    monkeypatch.setattr(math_grader._process, "ask", moments_are_too_short)
    texts = [f"{a}x^2+{b}xy" for a in range(1, 13) for b in range(1, 13)]
    graded = grade(problem("12x(x+y)"), boxes(texts), math_grader)
    assert [text for text, sample in zip(texts, graded.samples, strict=True) if sample.correct] == ["12x^2+12xy"]
    assert not any(sample.by_spelling for sample in graded.samples) and moments > 80


def test_every_form_of_a_few_answers_is_right_and_none_is_another(math_grader: MathGrader) -> None:
    assert len(FORMS) == 12 and misread(ANSWERS, math_grader) == []
    assert accepted(ANSWERS, 200, 0, math_grader) == []


def test_a_stop_ends_a_comparison_soon() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    grader, stop = MathGrader(), threading.Event()
    grader.check()

    def costs_its_limit_each_time() -> None:
        for _ in range(1000):
            grade(problem("1"), boxes([r"\binom{1000000}{500000}", "x+1"]), grader, stop.is_set)

    threading.Timer(0.2, stop.set).start()
    with pytest.raises(GradingStopped):
        costs_its_limit_each_time()


def test_a_killed_worker_is_followed_by_the_next() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    process = MathProcess()
    try:
        assert process.ask({"same": ["x+1", "1+x"]}, 5.0, lambda: False) == {"same": True}
        assert process.ask({"read": r"\binom{1000000}{500000}"}, 0.2, lambda: False) is None
        reply = process.ask({"same": ["x+1", "x+2"]}, 5.0, lambda: False)
        assert reply is not None and reply["same"] is False
    finally:
        process.close()


def test_a_library_that_does_not_import_is_named(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = f"{tmp_path}/math_verify"
    os.mkdir(broken)
    with open(f"{broken}/__init__.py", "w") as module:
        module.write("raise ImportError('antlr is too old')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(GradingError, match=r"antlr is too old.*pip install 'math-verify"):
        MathGrader().check()


def test_nothing_of_it_outlives_a_killed_run() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    code = """
        import time
        from sgl_lim.programs.math_process import MathProcess
        process = MathProcess()
        process.start()
        print(process._process.pid, flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    while _is_running(worker):  # the timeout of tests bounds it
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
