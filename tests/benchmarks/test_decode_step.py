"""The decode-step benchmark without a model: what it asks of workers, and what it makes of their results."""

import argparse
import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_step
from benchmarks.decode_step import make_rows, markdown, parse_backend
from benchmarks.decode_step_worker import Outcome
from benchmarks.forest import Forest

CASES = [Forest.parse("1x32512/16x256"), Forest.parse("1x2048")]
NAMES = list(map(str, CASES))
LOGITS = torch.arange(1.0, 13.0).reshape(2, 2, 3)


def outcome(ms: float, logits: torch.Tensor | None = LOGITS, **more: object) -> Outcome:
    """A worker that timed all cases, each step at about `ms` alone and 2 ms less pipelined."""
    times, pipelined = ({name: [x * 0.9, x, x, x, x * 1.1] for name in NAMES} for x in (ms, ms - 2))
    found = {"times": times, "pipelined": pipelined, "logits": logits, "machine": "M", **more}
    return Outcome(**found)  # type: ignore[arg-type]


def rows(found: Outcome, first: Outcome, spec: str = "triton", **more: bool) -> list[dict[str, object]]:
    return make_rows(parse_backend(spec), found, first, CASES, **more)


def test_backend_specs() -> None:
    plain = parse_backend("fa3")
    assert (plain.name, plain.lim, plain.environment) == ("fa3", None, {})
    sparse = parse_backend("lessismore:budget=1024,aggregate=max,selection_layers=2-12,recency=0.5")
    assert sparse.name == "lessismore" and sparse.lim is not None
    assert sparse.lim.given == {"budget": 1024, "aggregate": "max", "selection_layers": (2, 12), "recency": 0.5}
    assert json.loads(sparse.environment["LESSISMORE_CONFIG"]) == {
        "budget": 1024,
        "aggregate": "max",
        "selection_layers": [2, 12],
        "recency": 0.5,
    }
    ungrouped = parse_backend("lessismore:prefix_groups=off").lim
    assert ungrouped is not None and ungrouped.prefix_groups is False


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fa3:budget=1", "only lessismore"),
        ("lessismore:bugdet=1", "unknown keys bugdet"),
        ("lessismore:budget=many", "--lim-budget"),
        ("lessismore:selection_layers=12-2", "must increase"),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        parse_backend(spec)


def test_the_checked_batches_are_within_the_budget_and_one_shares_whole_pages() -> None:
    assert decode_step.checked_cases(2048) == ["2x1024", "1x896/2x128"]
    assert decode_step.checked_cases(64) == ["2x32", "1x16/2x16"]
    assert decode_step.checked_cases(1) == ["2x1"]


def test_worker_arguments_differ_in_the_backend_alone_and_the_users_come_last() -> None:
    argv = ["--model-path", "M", "--backends", "fa3", "lessismore:budget=64", "--cases", "16x8", "1x9", "1x5/2x3/4x9"]
    args = decode_step.parse([*argv, "--sglang-args=--device cpu"])
    dense, sparse = (decode_step.worker_argv(backend, args) for backend in args.backends)
    assert [word for word in dense if word != "fa3"] == [word for word in sparse if word != "lessismore"]
    assert dense[-7:] == ["--cuda-graph-bs-decode", "1", "2", "8", "16", "--device", "cpu"]
    assert args.backends[1].command(sparse).startswith("""LESSISMORE_CONFIG='{"budget": 64}' --model-path M""")


def test_cases_or_a_profile_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--cases", "1x2", "--profile", "1x2"]):
        with pytest.raises(SystemExit):
            decode_step.parse(["--model-path", "M", "--backends", "fa3", *argv])
        assert "--cases or --profile" in capsys.readouterr().err


def test_rows_have_times_and_the_ratio_to_the_first_backend() -> None:
    first, second = rows(outcome(20), outcome(20), spec="fa3"), rows(outcome(8), outcome(20))
    assert tuple(first[0]) == decode_step.COLUMNS
    assert [row["ratio"] for row in first + second] == [1, 1, 2.5, 2.5]
    row = second[0]
    assert (row["batch"], row["context"], row["prefixes"]) == (16, 32768, "1x32512")
    assert (row["step_ms"], row["error"], row["machine"]) == (8, "", "M")
    assert row["tokens_per_s"] == 2000
    assert row["p20_ms"] == pytest.approx(7.84) and row["p80_ms"] == pytest.approx(8.16)
    assert [row["pipelined_ratio"] for row in first + second] == [1, 1, 3, 3]
    assert row["pipelined_ms"] == row["pipelined_mean_ms"] == 6 and row["pipelined_mean_ratio"] == 3
    assert row["pipelined_p20_ms"] == pytest.approx(5.88) and row["pipelined_p80_ms"] == pytest.approx(6.12)


def test_a_failed_check_takes_every_speed() -> None:
    for wrong in (LOGITS * 1.1, LOGITS * float("nan"), LOGITS + torch.tensor([0, 0, float("inf")])):
        for row in rows(outcome(8, wrong), outcome(20)):
            assert row["error"] == "check failed"
            assert {row[name] for name in (*decode_step.ALONE, *decode_step.PIPELINED, "tokens_per_s")} == {""}
    assert {row["error"] for row in rows(outcome(8, finite=False), outcome(20))} == {"check failed"}
    good = rows(outcome(8, LOGITS * 1.01), outcome(20))
    assert {row["error"] for row in good} == {""} and good[0]["logits_error_within_budget"] == "0.01"


def test_a_failed_check_shows_its_error_beside_the_limit() -> None:
    def said(logits: torch.Tensor, **more: object) -> str:
        return decode_step.check_figures(outcome(8, logits, **more), outcome(20))

    assert said(LOGITS) == said(LOGITS * 1.01) == ""
    assert said(LOGITS * 1.1) == "logits_error_within_budget 0.1, limit 0.05"
    broken = said(LOGITS * float("nan"), finite=False)
    assert broken == "logits_error_within_budget nan, limit 0.05; logits within the budget are not all finite"
    beyond = said(LOGITS, finite=False)
    assert beyond == "logits_error_within_budget 0, limit 0.05; logits beyond the budget are not all finite"
    assert decode_step.check_figures(Outcome(error="crashed"), outcome(20)) == ""


def test_one_wrong_request_in_one_step_is_enough() -> None:
    wrong = LOGITS.clone()
    wrong[1, 0] *= 2
    assert decode_step.logits_error(wrong, LOGITS) == pytest.approx(1)


def test_nothing_is_believed_without_logits_of_both() -> None:
    assert {row["error"] for row in rows(outcome(8, None), outcome(20))} == {"check failed"}
    silent = Outcome(error="the worker ended with status 1")
    assert {row["error"] for row in rows(silent, outcome(20))} == {"the worker ended with status 1"}
    unfounded = rows(outcome(8), silent)
    assert all("first backend has no logits" in str(row["error"]) and row["step_ms"] == "" for row in unfounded)


def test_without_the_check_a_failed_first_backend_costs_only_the_ratio() -> None:
    unchecked = rows(outcome(8, None), Outcome(error="broken"), check=False)
    assert [(row["step_ms"], row["ratio"], row["error"]) for row in unchecked] == [(8, "", "")] * 2
    assert [(row["pipelined_ms"], row["pipelined_ratio"]) for row in unchecked] == [(6, "")] * 2


def test_a_failed_case_leaves_the_others() -> None:
    found = outcome(8, errors={NAMES[0]: "pool"})
    del found.times[NAMES[0]]
    assert [row["error"] for row in rows(found, outcome(20))] == ["pool", ""]


def test_a_crash_leaves_what_was_timed_before_it() -> None:
    found = outcome(8, error="the worker ended with status -11")
    del found.times[NAMES[1]]
    assert [row["error"] for row in rows(found, outcome(20))] == ["", "the worker ended with status -11"]


def test_outcomes_survive_the_file(tmp_path: Path) -> None:
    saved = outcome(8, errors={"2x3": "pool"}, kernels=[("k", 2, 1.5)])
    saved.save(tmp_path / "outcome.pt")
    read = Outcome(**torch.load(tmp_path / "outcome.pt"))
    assert read.times == saved.times and read.pipelined == saved.pipelined
    assert read.errors == saved.errors and read.kernels == saved.kernels
    assert read.logits is not None and torch.equal(read.logits, LOGITS)


def test_the_table_has_cases_down_and_backends_across() -> None:
    found = outcome(8, errors={NAMES[1]: "pool"})
    del found.times[NAMES[1]]
    table = markdown(rows(outcome(20), outcome(20), spec="fa3") + rows(found, outcome(20)))
    assert table.splitlines()[0] == "| batch | context | prefixes | fa3 | triton |"
    assert table.splitlines()[2:] == [
        "| 16 | 32768 | 1x32512 | 20.00 / 18.00 | 8.00 / 6.00 (2.50x / 3.00x) |",
        "| 1 | 2048 |  | 20.00 / 18.00 | pool |",
        "",
        "ms a step, alone / pipelined (times as fast as the first backend)",
    ]


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    for spec in ("fa3", "lessismore:budget=64,aggregate=max"):
        decode_step.append_rows(
            tmp_path / "new" / "out.csv", decode_step.COLUMNS, rows(outcome(8), outcome(20), spec=spec)
        )
    with (tmp_path / "new" / "out.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["backend"] for row in read] == ["fa3"] * 2 + ["lessismore:budget=64,aggregate=max"] * 2
    assert float(read[3]["ratio"]) == 2.5


def test_a_file_with_other_columns_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "old.csv"
    output.write_text("backend,step_ms\nfa3,1\n")
    argv = ["decode_step.py", "--model-path", "M", "--backends", "fa3", "--cases", "1x2", "--output", str(output)]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(decode_step, "run_worker", None)
    with pytest.raises(SystemExit, match="other columns"):
        decode_step.main()
    assert output.read_text() == "backend,step_ms\nfa3,1\n"


def test_a_worker_is_this_module_and_finds_its_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    run = subprocess.run

    def started_only(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", started_only)
    assert decode_step.run_worker(parse_backend("fa3"), {}, timeout=9).error == "the worker ended with status 3"
    [[*command, worker, job]] = started
    assert worker == "--worker" and "outcome" in json.loads(job)
    assert "--backends" in run([*command, "--help"], capture_output=True, text=True, check=True).stdout
