"""The whole command line and the frontend programs, against a stub endpoint."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import COUNTERS, Reply, StubEndpoint

from sgl_lim.programs import math_grading
from sgl_lim.programs.cli import main
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_records import read_rows
from support.waiting import has_lines, wait_until

SIZES = ["--facts", "6", "--steps", "2"]
PROBLEMS = chain_problems(4, num_facts=6, num_steps=2, seed=0).problems
SOLUTIONS = {problem.prompt: str(problem.solution) for problem in PROBLEMS}


def solved(prompt: str) -> Reply:
    return " " + SOLUTIONS[prompt]


class Cli:
    """Runs the command over the stub; `--output` and `--summary` are in the test's folder."""

    def __init__(self, stub: StubEndpoint, folder: Path) -> None:
        self.stub, self.output, self.summary_path = stub, folder / "out.jsonl", folder / "summary.json"
        stub.answer = solved

    def argv(self, *more: str, source: tuple[str, ...] = ("--chains", "4", *SIZES)) -> list[str]:
        paths = ["--output", str(self.output), "--summary", str(self.summary_path)]
        return ["--endpoint", self.stub.url, *source, *paths, *more]

    def __call__(self, *more: str, **changes: Any) -> int:
        return main(self.argv(*more, **changes))

    def start(self, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "sgl_lim.programs", *self.argv(*more)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self.summary_path.read_text()))


@pytest.fixture
def cli(stub: StubEndpoint, tmp_path: Path) -> Cli:
    return Cli(stub, tmp_path)


def test_solve(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    cli.stub.counters = dict.fromkeys(COUNTERS, 0)
    assert cli() == 0
    assert sorted(cli.stub.prompts) == sorted(SOLUTIONS)
    parameters = cli.stub.generate_requests[0]["sampling_params"]
    assert (parameters["temperature"], parameters["max_new_tokens"], parameters["top_p"]) == (0.0, 24, 1.0)
    assert all(row.correct and row.samples[0].whole_chain for row in read_rows(cli.output))
    summary = cli.summary
    assert summary["accuracy"] == summary["whole_chain_accuracy"] == summary["word_accuracy"] == 1.0
    assert summary["attended_fraction"] == 0.25
    assert summary["settings"]["attention"]["budget"] == 256
    assert summary["invocation"]["output_tokens"] == summary["generation_tokens"]["total"] > 0
    captured = capsys.readouterr()
    assert "share of KV read   0.250" in captured.out and "budget 256" in captured.out
    assert "4/4 problems, 4/4 correct" in captured.err


def test_self_consistency_caches_the_prompt_once_and_votes(cli: Cli) -> None:
    calls: dict[str, int] = {}
    lock = threading.Lock()

    def two_of_three(prompt: str) -> Reply:
        with lock:
            calls[prompt] = calls.get(prompt, 0) + 1
            return "answer 100" if calls[prompt] == 1 else solved(prompt)

    cli.stub.answer = two_of_three
    assert cli("--program", "self-consistency", "--samples", "3") == 0
    for prompt in SOLUTIONS:
        own = [r["sampling_params"] for r in cli.stub.generate_requests if r["text"] == prompt]
        assert [p["max_new_tokens"] for p in own] == [0, 24, 24, 24], "the prefix is to be cached before the branches"
        assert all(p["temperature"] == 0.6 for p in own[1:])
    summary = cli.summary
    assert summary["accuracy"] == 1.0 and summary["pass_at_1"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["accuracy_of"] == "maj@3"
    assert summary["samples"] == 12 and summary["attended_note"] == "dense" and summary["attended_fraction"] == 1.0


def test_what_is_answered_is_not_asked_again(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(source=("--chains", "2", *SIZES)) == 0
    cli.stub.generate_requests.clear()
    assert cli() == 0
    assert sorted(cli.stub.prompts) == sorted(problem.prompt for problem in PROBLEMS[2:])
    assert cli.summary["answered"] == 4 and cli.summary["invocation"]["items"] == 2
    cli.stub.generate_requests.clear()
    assert cli() == 0
    assert not cli.stub.prompts
    assert cli.summary["answered"] == 4 and cli.summary["output_tokens_per_second"] > 0
    assert cli.summary["invocation"]["items"] == 0 and cli.summary["measured"]["invocations"] == 2
    assert cli.summary["measured"]["items"] == 4 and cli.summary["attended_fraction"] == 1.0
    assert "4 of 4 problems answered before, 0 to ask" in capsys.readouterr().err


def test_failed_items_are_reported_and_retried(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    bad = PROBLEMS[1]
    cli.stub.answer = lambda prompt: (400, "too long a prompt") if prompt == bad.prompt else solved(prompt)
    assert cli() == 0
    assert cli.summary["errors"] == 1 and cli.summary["accuracy"] == 1.0
    err = capsys.readouterr().err
    assert f"problem {bad.id}: GenerationError: too long a prompt\n" in err and "--chains 4" in err
    cli.stub.answer = solved
    cli.stub.generate_requests.clear()
    assert cli() == 0
    assert cli.stub.prompts == [bad.prompt]
    assert cli.summary["errors"] == 0 and cli.summary["answered"] == 4
    assert len(read_rows(cli.output)) == 5


@pytest.mark.parametrize("samples", [[], ["--program", "self-consistency", "--samples", "2"]])
def test_a_server_that_answers_nothing_is_a_failure(cli: Cli, samples: list[str]) -> None:
    cli.stub.answer = lambda prompt: (500, "broken")
    assert cli(*samples) == 1
    assert cli.summary["errors"] == 4 and cli.summary["accuracy"] is None


def test_a_failing_prefix_commit_is_an_error_and_no_hang(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = cli.stub.generate
    monkeypatch.setattr(
        cli.stub,
        "generate",
        lambda request: (
            generate(request)
            if request["sampling_params"]["max_new_tokens"]
            else (500, {"error": {"message": "pool full"}})
        ),
    )
    before = threading.active_count()
    assert cli("--program", "self-consistency", "--samples", "2") == 1
    assert all(row.error == "GenerationError: pool full" for row in read_rows(cli.output))
    wait_until(lambda: threading.active_count() <= before, "the end of the branches' threads")


def test_an_aborted_request_is_no_answer(cli: Cli) -> None:
    cli.stub.finish_reason = {"type": "abort", "message": "retracted"}
    assert cli() == 1
    assert all(row.error is not None and "retracted" in row.error for row in read_rows(cli.output))


def test_other_settings_are_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli() == 0
    content = cli.output.read_bytes()
    cli.stub.counters = dict.fromkeys(COUNTERS, 0)
    assert cli("--max-tokens", "30") == 2
    err = capsys.readouterr().err
    assert "--output" in err and "max_tokens: file has 24, this run has 30" in err
    assert 'attention.decode: file has "dense", this run has "lessismore"' in err
    assert cli.output.read_bytes() == content


def test_a_server_that_leaves_during_the_run(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    def leave(prompt: str) -> Reply:
        if len(cli.stub.prompts) > 2:
            cli.stub.go_away()
            raise ConnectionAbortedError
        return solved(prompt)

    cli.stub.answer = leave
    assert cli("--concurrency", "1") == 1
    assert [row.error for row in read_rows(cli.output)] == [None, None]
    err = capsys.readouterr().err
    assert "2 of 4 problems are answered" in err and "to ask the rest: python -m sgl_lim.programs" in err


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "o"
    assert main(["--endpoint", "http://127.0.0.1:9", "--chains", "1", *SIZES, "--output", str(output)]) == 1
    assert "is the server up?" in capsys.readouterr().err
    assert not output.exists()


def test_a_restarted_server_has_no_fraction(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    def restart(prompt: str) -> Reply:
        cli.stub.startup_time = 2.0
        return solved(prompt)

    cli.stub.answer = restart
    assert cli() == 0
    assert cli.summary["attended_fraction"] is None
    assert "restarted during the run" in capsys.readouterr().out


@pytest.fixture
def questions(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "2+2?", "answer": "4"}\n')
    return "--problems", str(path)


def test_mathematics_in_a_chat_template(cli: Cli, questions: tuple[str, str]) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.answer = lambda prompt: "<think>hm</think> It is \\boxed{\\frac{8}{2}}."
    assert cli("--chat-template", "chatml", source=questions) == 0
    assert sorted(cli.stub.prompts)[0].startswith("<|im_start|>user\n1+1?\n\nPlease reason step by step")
    assert all(prompt.endswith("\\boxed{}.<|im_end|>\n<|im_start|>assistant\n") for prompt in cli.stub.prompts)
    assert "<|im_end|>" in cli.stub.generate_requests[0]["sampling_params"]["stop"]
    assert cli.summary["accuracy"] == 0.5 and cli.summary["word_accuracy"] is None
    assert cli.summary["settings"]["chat_template"] == "chatml"


def test_a_generation_that_was_cut_off_has_no_answer(
    cli: Cli, questions: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.answer = lambda prompt: "It may be \\boxed{2}, but"
    cli.stub.finish_reason = {"type": "length", "length": 8}
    assert cli("--chat-template", "chatml", source=questions) == 0
    assert cli.summary["accuracy"] == 0 and cli.summary["samples_cut_off"] == 2
    assert all(json.loads(line)["answer"] is None for line in cli.output.read_text().splitlines()[:2])


@pytest.mark.parametrize("program", ["solve", "self-consistency", "tree", "budget-forcing"])
def test_a_prompt_that_opens_the_thinking_is_told_to_the_grader(
    cli: Cli, questions: tuple[str, str], program: str
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.answer = lambda prompt: "Perhaps \\boxed{2}."
    shape = {
        "tree": ["--branches", "2", "--keep", "1", "--depth", "1", "--thought-tokens", "8"],
        "budget-forcing": ["--min-thinking", "1", "--thinking-end", "</think>"],
        "self-consistency": ["--samples", "2"],
    }
    flags = ["--program", program, "--max-tokens", "64", *shape.get(program, [])]
    assert cli(*flags, "--prompt-template", "{problem}\n<think>\n", source=questions) == 0
    rows = [json.loads(line) for line in cli.output.read_text().splitlines()[:2]]
    assert all(sample["thinking_opened"] for row in rows for sample in row["samples"])
    assert cli.summary["accuracy"] == 0


def test_the_summary_says_which_grader_made_it_and_no_other_goes_on(
    cli: Cli, questions: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.answer = lambda prompt: "\\boxed{2}"
    assert cli("--limit", "1", source=questions) == 0
    grader = cli.summary["settings"]["grader"]
    assert "math-verify" in grader and re.search(rf"graded by +{re.escape(grader)}", capsys.readouterr().out)
    monkeypatch.setattr(math_grading, "_RULES", 99)
    assert cli(source=questions) == 2
    assert f'grader: file has "{grader}", this run has "math 99' in capsys.readouterr().err


def test_limit_and_raw_prompt_template(cli: Cli, questions: tuple[str, str]) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.answer = lambda prompt: "\\boxed{2}"
    assert cli("--limit", "1", "--prompt-template", "Q: {problem} A:", source=questions) == 0
    assert cli.stub.prompts == ["Q: 1+1? A:"]
    assert cli("--prompt-template", "Q: {problem} A:", source=questions) == 0
    assert cli.stub.prompts == ["Q: 1+1? A:", "Q: 2+2? A:"]


@pytest.mark.parametrize(
    ("flags", "part"), [(["--chat"], "--chat-template (chatml"), (["--chat-template", "nope"], "'nope'; there are")]
)
def test_an_unknown_chat_template_is_refused(
    cli: Cli, questions: tuple[str, str], flags: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    assert cli(*flags, source=questions) == 2
    assert part in capsys.readouterr().err
    assert not cli.stub.generate_requests


def test_a_chat_template_is_found_by_the_models_path(cli: Cli, questions: tuple[str, str]) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    cli.stub.model_path = "models/Qwen2.5-7B-Instruct"
    cli.stub.answer = lambda prompt: "\\boxed{4}"
    assert cli("--chat", source=questions) == 0
    assert cli.stub.prompts[0].startswith("<|im_start|>system\n")


def test_without_math_verify_no_request_is_sent(
    cli: Cli, questions: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert cli(source=questions) == 1
    assert "pip install 'math-verify>=0.9,<1'" in capsys.readouterr().err
    assert not cli.stub.generate_requests and not cli.output.exists()


def test_a_bad_problem_file_is_a_usage_error(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"problem": "1+1?"}\n')
    assert cli(source=("--problems", str(tmp_path / "bad.jsonl"))) == 2
    assert "bad.jsonl:1: missing key 'answer'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_is_resumed(cli: Cli, number: signal.Signals, code: int) -> None:
    release = threading.Event()

    def answer(prompt: str) -> Reply:
        if len(cli.stub.prompts) > 2:
            release.wait(timeout=120)
        return solved(prompt)

    cli.stub.answer = answer
    process = cli.start("--concurrency", "1")
    try:
        wait_until(lambda: has_lines(cli.output, 2), "two answered problems", beside=process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        release.set()
    assert process.returncode == code
    assert [row.error for row in read_rows(cli.output)] == [None, None]
    if number != signal.SIGKILL:
        assert "interrupted: 2 of 4 problems are answered" in err
        assert "Traceback" not in err
        command = err.split("to ask the rest: ")[1].splitlines()[0]
        assert command.startswith("python -m sgl_lim.programs") and str(cli.output) in command
    whole = b"".join(row.to_json().encode() + b"\n" for row in read_rows(cli.output))
    if number != signal.SIGKILL:
        assert cli.output.read_bytes().startswith(whole), "what was measured stands behind the rows"
    cli.output.write_bytes(whole[:-30])
    cli.stub.answer = solved
    cli.stub.generate_requests.clear()
    assert cli("--concurrency", "1") == 0
    assert len(cli.stub.prompts) == 3, "one row was torn"
    assert cli.summary["answered"] == 4 and cli.summary["accuracy"] == 1.0
