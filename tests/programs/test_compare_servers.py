"""Several stub servers on the same items: runs, resuming, tables, the plot, and what is refused."""

import csv
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import COUNTERS, Reply, StubEndpoint

from sgl_lim.programs import comparison_plot
from sgl_lim.programs.compare_servers import main
from sgl_lim.programs.intervals import wilson_interval
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_records import read_rows
from support.waiting import has_lines, wait_until

SIZES = ["--chains", "4", "--facts", "6", "--steps", "2"]
PROBLEMS = chain_problems(4, num_facts=6, num_steps=2, seed=0).problems
SOLUTIONS = {problem.prompt: str(problem.solution) for problem in PROBLEMS}


def solved(prompt: str) -> Reply:
    return " " + SOLUTIONS[prompt]


def solved_but_one(prompt: str) -> Reply:
    wrong = f" answer {(int(PROBLEMS[2].answer) + 1) % 100}"
    return wrong if prompt == PROBLEMS[2].prompt else solved(prompt)


@pytest.fixture
def dense(stub: StubEndpoint) -> StubEndpoint:
    stub.answer = solved
    return stub


@pytest.fixture
def lim() -> Iterator[StubEndpoint]:
    with StubEndpoint(answer=solved_but_one, counters=dict.fromkeys(COUNTERS, 0)) as endpoint:
        yield endpoint


def argv(folder: Path, dense: StubEndpoint, lim: StubEndpoint, *more: str) -> list[str]:
    return [f"dense={dense.url}", f"lim={lim.url}", *SIZES, "--output", str(folder), *more]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("order", [[], ["--at-once"]])
def test_the_same_items_on_both(
    tmp_path: Path, dense: StubEndpoint, lim: StubEndpoint, order: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    more = ["--samples", "2", "--machine", "a stub | of two", *order]
    assert main(argv(tmp_path, dense, lim, *more)) == 0
    assert sorted(dense.prompts) == sorted(lim.prompts) == sorted([*SOLUTIONS, *SOLUTIONS])
    first, other = table(tmp_path)
    assert (first["server"], first["metric"], first["accuracy"], first["attended_fraction"]) == (
        "dense",
        "pass@1",
        "1.0",
        "1.0",
    )
    assert (other["accuracy"], other["majority"], other["attended_fraction"], other["pairs"]) == (
        "0.75",
        "0.75",
        "0.25",
        "4",
    )
    assert float(other["accuracy_low"]) < 0.75 < float(other["accuracy_high"])
    assert float(other["difference"]) == -0.25 and float(other["difference_low"]) < -0.25 <= float(
        other["difference_high"]
    )
    assert float(other["length_ratio"]) < 1 and first["difference"] == first["pairs"] == ""
    assert float(other["attended_tokens"]) < float(first["attended_tokens"]) / 3
    assert all(float(row["tokens_per_s"]) > 0 and float(row["mean_tokens"]) > 0 for row in (first, other))
    assert json.loads(other["settings"])["attention"]["budget"] == 256 and other["machine"] == "a stub | of two"
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "comparison.md").read_text()
    assert "| lim | 75.0% [" in captured.out and "-25.0 [" in captured.out and "maj@2 [95%]" in captured.out
    assert "lim: server " in captured.err, "the servers' own lines carry their names"
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_resumed_and_its_tables_need_no_matplotlib(
    tmp_path: Path,
    dense: StubEndpoint,
    lim: StubEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(argv(tmp_path, dense, lim)) == 1
    err = capsys.readouterr().err
    assert "pip install 'matplotlib>=3.8,<4'" in err and "the tables are in" in err
    before = table(tmp_path)
    assert len(before) == 2 and (tmp_path / "comparison.md").exists() and not (tmp_path / "comparison.png").exists()

    dense.generate_requests.clear()
    lim.generate_requests.clear()
    assert main(argv(tmp_path, dense, lim, "--chains", "2")) == 1
    assert [(row["problems"], row["pairs"]) for row in table(tmp_path)] == [("2", ""), ("2", "2")]
    assert main(argv(tmp_path, dense, lim)) == 1
    assert table(tmp_path) == before, "speed and attended tokens are kept"
    assert main(argv(tmp_path, dense, lim, "--max-tokens", "30")) == 2
    assert "error: dense: --output:" in capsys.readouterr().err
    assert not dense.prompts and not lim.prompts


def test_points_without_a_place_are_left_out() -> None:
    row: dict[str, Any] = {
        "server": "a",
        "attended_tokens": 3.0,
        "accuracy": 0.5,
        "accuracy_low": 0.4,
        "accuracy_high": 0.6,
    }
    assert comparison_plot.points([row, {**row, "attended_tokens": None}]) == [("a", 3.0, 0.5, 0.4, 0.6)]


def test_nothing_right_and_a_machine_with_dollars_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    low, high = wilson_interval(0.0, 12) or (1, 0)
    row = {"server": "a", "attended_tokens": 3.0, "accuracy": 0.0, "accuracy_low": low, "accuracy_high": high}
    told = {"metric": "pass@1", "program": "solve", "problems": 12, "machine": "$2_ an hour, not $3^"}
    comparison_plot.draw([{**row, **told}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_server_that_fails_ends_the_comparison(
    tmp_path: Path, dense: StubEndpoint, lim: StubEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    lim.answer = lambda prompt: (500, "broken")
    assert main(argv(tmp_path, dense, lim)) == 1
    err = capsys.readouterr().err
    assert "no comparison: lim failed; to go on: python -m sgl_lim.programs.compare_servers dense=" in err
    assert "lim: problem" in err and not (tmp_path / "comparison.csv").exists()
    lim.answer = solved
    dense.generate_requests.clear()
    assert main(argv(tmp_path, dense, lim)) == 0 and not dense.prompts


def test_everything_is_checked_before_the_first_request(
    tmp_path: Path, dense: StubEndpoint, lim: StubEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    lim.context = 30
    assert main(argv(tmp_path, dense, lim)) == 2
    assert "error: lim: --steps/--facts: the longest prompt" in capsys.readouterr().err
    lim.go_away()
    assert main(argv(tmp_path, dense, lim)) == 1
    assert "error: lim: http" in capsys.readouterr().err
    assert not dense.generate_requests


def test_servers_that_would_be_asked_differently_are_refused(
    tmp_path: Path, dense: StubEndpoint, lim: StubEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    questions = tmp_path / "p.jsonl"
    questions.write_text('{"problem": "1+1?", "answer": 2}\n')
    lim.context = 2048
    names = [f"dense={dense.url}", f"lim={lim.url}", "--problems", str(questions), "--output", str(tmp_path / "out")]
    assert main(names) == 2
    err = capsys.readouterr().err
    assert "max_tokens: dense has" in err and "lim has" in err and "(--max-tokens)" in err
    assert not dense.generate_requests


@pytest.mark.parametrize(
    ("servers", "said"),
    [
        (["dense=http://a:1"], "two servers or more"),
        (["dense=http://a:1", "dense=http://b:1"], "dense is taken"),
        (["dense=http://a:1", "comparison=http://b:1"], "comparison is taken"),
        (["dense=http://a:1", "b"], "must be NAME=http"),
        (["dense=http://a:1", "../x=http://b:1"], "must be NAME=http"),
        (["a=http://a:1", "b=http://b:1", "--waits", "2"], "--waits: only with --program budget-forcing"),
        (["a=http://a:1", "b=http://b:1", "--summary", "s"], "unrecognized arguments: --summary"),
    ],
)
def test_bad_arguments_are_named(servers: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*servers, "--chains", "1", "--output", "o"])
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_an_interrupted_comparison_hands_the_signal_on(tmp_path: Path, dense: StubEndpoint, lim: StubEndpoint) -> None:
    release = threading.Event()

    def answer(prompt: str) -> Reply:
        if len(dense.prompts) > 2:
            release.wait(timeout=120)
        return solved(prompt)

    dense.answer = answer
    command = [
        sys.executable,
        "-m",
        "sgl_lim.programs.compare_servers",
        *argv(tmp_path, dense, lim, "--concurrency", "1"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: has_lines(tmp_path / "dense.jsonl", 2), "two answered problems", beside=process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        release.set()
    assert process.returncode == 143 and "Traceback" not in err
    assert "dense: interrupted: 2 of 4 problems are answered" in err
    assert "interrupted; to go on: python -m sgl_lim.programs.compare_servers dense=" in err and not lim.prompts
    assert len(read_rows(tmp_path / "dense.jsonl")) == 2
