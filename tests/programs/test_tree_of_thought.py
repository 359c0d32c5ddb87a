"""Tree of thought against a stub endpoint: which paths live on, what is asked of the server, and what is recorded."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import Reply, StubEndpoint

from sgl_lim.programs.cli import main
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_options import parse
from sgl_lim.programs.run_records import Generation, read_rows
from sgl_lim.programs.tree_shape import TreeShape

PROMPT = "think of it"
SHAPE = TreeShape(branches=4, keep=2, depth=2, thought_tokens=5)


class Thinker:
    """The n-th reply to a text says `t<n>`, thoughts and answers alike; `scores` are log-probabilities by reply."""

    def __init__(self, stub: StubEndpoint, scores: dict[str, float]) -> None:
        self.stub, self.lock, self.asked = stub, threading.Lock(), dict[str, int]()
        stub.answer, stub.finish_reason = self.answer, {"type": "length"}
        stub.logprob = lambda text: scores.get(text.strip(), -5.0)

    def answer(self, prompt: str) -> Reply:
        with self.lock:
            self.asked[prompt] = self.asked.get(prompt, -1) + 1
            return f" t{self.asked[prompt]}"

    def grow(self, shape: TreeShape = SHAPE, tokens: int = 13, **sampling: Any) -> Generation:
        from sgl_lim.programs.reasoning import connect, make_ask

        ask = make_ask(
            connect(self.stub.url), num_samples=None, chat=False, tree=shape, max_new_tokens=tokens, **sampling
        )
        (generation,) = ask(PROMPT)
        return generation


def sizes(stub: StubEndpoint, text: str) -> list[int]:
    return [r["sampling_params"]["max_new_tokens"] for r in stub.generate_requests if r["text"] == text]


def test_the_most_probable_paths_live_on_and_the_best_is_answered(stub: StubEndpoint) -> None:
    thinker = Thinker(stub, {"t1": -0.5, "t3": -0.2})
    generation = thinker.grow(temperature=0.8)
    # The context is cached before its branches; so is each path that is thought on from.
    assert sizes(stub, PROMPT) == [0, 5, 5, 5, 5]
    assert sizes(stub, f"{PROMPT} t3") == sizes(stub, f"{PROMPT} t1") == [0, 5, 5]
    assert not sizes(stub, f"{PROMPT} t0") and not sizes(stub, f"{PROMPT} t2")
    # Means over whole paths: t3 t1 (-0.35) before t1 t1 (-0.5) and t3 t0 (-2.6); an answer of 13 - 2 x 5 tokens.
    assert sizes(stub, f"{PROMPT} t3 t1") == [3]
    assert generation.text == " t3 t1 t0" and generation.finish_reason == "length"
    assert (generation.completion_tokens, generation.other_tokens) == (3, 4 + 4 + 1 - 3)
    asked = [r for r in stub.generate_requests if r["sampling_params"]["max_new_tokens"]]
    assert len(asked) == 9 and all(r["sampling_params"]["temperature"] == 0.8 for r in asked)
    assert [r["return_logprob"] for r in asked if r["text"] != f"{PROMPT} t3 t1"] == [True] * 8
    assert generation.prompt_tokens == sum(len(r["text"].split()) for r in asked)
    assert generation.cached_tokens == sum(len(r["text"].split()) // 2 for r in asked)


def test_lengths_are_fixed_where_the_end_of_text_is_ignored(stub: StubEndpoint) -> None:
    Thinker(stub, {}).grow(ignore_eos=True)
    asked = [r["sampling_params"] for r in stub.generate_requests if r["sampling_params"]["max_new_tokens"]]
    assert len(asked) == 9 and all(parameters["ignore_eos"] for parameters in asked)


def test_a_thought_that_ends_is_an_answer_and_nobody_thinks_on_from_it(
    stub: StubEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinker = Thinker(stub, {"t2": -0.1, "t1": -0.3})
    generate = stub.generate

    def ended(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, body = generate(request)
        if request["text"] == PROMPT and body["text"] == " t2":
            body["meta_info"]["finish_reason"] = {"type": "stop"}
        return status, body

    monkeypatch.setattr(stub, "generate", ended)
    generation = thinker.grow()
    assert (generation.text, generation.finish_reason, generation.completion_tokens) == (" t2", "stop", 1)
    assert not sizes(stub, f"{PROMPT} t2")
    # All branches of the second round go to the other path.
    assert sizes(stub, f"{PROMPT} t1") == [0, 5, 5, 5, 5]
    assert generation.other_tokens == 4 + 4 - 1


def test_where_all_thoughts_end_there_is_no_further_round(stub: StubEndpoint) -> None:
    thinker = Thinker(stub, {"t1": -0.5})
    stub.finish_reason = {"type": "stop"}
    assert thinker.grow().text == " t1"
    assert {r["text"] for r in stub.generate_requests} == {PROMPT}


def test_a_tree_of_one_path_a_branch(stub: StubEndpoint) -> None:
    shape = TreeShape(branches=2, keep=2, depth=3, thought_tokens=1)
    assert Thinker(stub, {"t0": -0.1}).grow(shape, 4).text == " t0 t0 t0 t0"
    assert sizes(stub, f"{PROMPT} t0 t0") == sizes(stub, f"{PROMPT} t1 t0") == [1]


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize(
    ("failing", "commit"),
    [(PROMPT, True), (PROMPT, False), (f"{PROMPT} t3", True), (f"{PROMPT} t3", False), (f"{PROMPT} t3 t1", False)],
)
def test_a_failing_request_is_an_error_and_leaves_no_thread(
    stub: StubEndpoint, monkeypatch: pytest.MonkeyPatch, failing: str, commit: bool
) -> None:
    from sgl_lim.programs.reasoning import GenerationError

    thinker, generate = Thinker(stub, {"t1": -0.5, "t3": -0.2}), stub.generate

    def fail(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if request["text"] == failing and (request["sampling_params"]["max_new_tokens"] == 0) is commit:
            return 500, {"error": {"message": "pool full"}}
        return generate(request)

    monkeypatch.setattr(stub, "generate", fail)
    before = {thread for thread in threading.enumerate() if not thread.daemon}
    with pytest.raises(GenerationError, match="pool full"):
        thinker.grow()
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread not in before]
    for thread in left:
        thread.join(timeout=10)
    assert not [thread for thread in left if thread.is_alive()]


FLAGS = ["--program", "tree", "--branches", "4", "--keep", "2", "--depth", "1", "--thought-tokens", "9"]
PROBLEMS = chain_problems(3, num_facts=6, num_steps=2, seed=0).problems
SOLUTIONS = {problem.prompt: str(problem.solution).split() for problem in PROBLEMS}


def solve(prompt: str) -> Reply:
    """The next nine words of the solution, or the rest where thoughts stand behind the prompt."""
    problem = next(problem.prompt for problem in PROBLEMS if prompt.startswith(problem.prompt))
    words = SOLUTIONS[problem]
    return " " + " ".join(words[:9] if prompt == problem else words[9:])


def argv(stub: StubEndpoint, folder: Path, *more: str) -> list[str]:
    paths = ["--output", str(folder / "out.jsonl"), "--summary", str(folder / "summary.json")]
    return ["--endpoint", stub.url, "--chains", "3", "--facts", "6", "--steps", "2", *paths, *FLAGS, *more]


def test_the_runner_grades_records_and_resumes_it(
    stub: StubEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.finish_reason, stub.answer = {"type": "length"}, solve
    assert main(argv(stub, tmp_path)) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == 3 and all(row.correct and row.samples[0].whole_chain for row in rows)
    assert all(row.samples[0].other_tokens == 3 * 9 and row.samples[0].completion_tokens == 18 for row in rows)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"] == summary["word_accuracy"] == 1.0 and summary["other_branch_tokens"] == 3 * 27
    assert summary["invocation"]["output_tokens"] == 3 * (27 + 18)
    assert summary["settings"]["program"] == "tree_of_thought"
    assert summary["settings"]["tree"] == {"branches": 4, "keep": 2, "depth": 1, "thought_tokens": 9}
    out = capsys.readouterr().out
    assert "on other branches  81 tokens" in out and "accuracy " in out

    stub.generate_requests.clear()
    assert main(argv(stub, tmp_path)) == 0 and not stub.generate_requests
    assert main(argv(stub, tmp_path, "--thought-tokens", "5")) == 2
    assert "tree.thought_tokens: file has 9, this run has 5" in capsys.readouterr().err


def test_thoughts_that_leave_nothing_for_the_answer_are_refused(
    stub: StubEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(stub, tmp_path, "--thought-tokens", "24")) == 2
    assert "--thought-tokens: 1 rounds of 24 tokens leave nothing of the 24" in capsys.readouterr().err
    assert not stub.generate_requests and not (tmp_path / "out.jsonl").exists()


CHAINS = ["--chains", "4", "--output", "o"]


def test_the_shape_by_default() -> None:
    options = parse([*CHAINS, "--program", "tree"])
    assert options.tree == TreeShape(branches=8, keep=2, depth=2, thought_tokens=128) and options.samples is None
    assert (options.temperature, options.top_p) == (0.6, 0.95)
    assert parse(CHAINS).tree is None and parse([*CHAINS, "--program", "self-consistency"]).tree is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--program", "tree", "--temperature", "0"], "--temperature: must be above 0 with --program tree"),
        (["--program", "tree", "--samples", "3"], "--samples: not with --program tree"),
        (["--program", "tree", "--keep", "3"], r"--branches: must be a multiple of --keep \(3\), got 8"),
        (["--program", "tree", "--branches", "1"], "--branches: must be at least 2"),
        (["--program", "tree", "--depth", "0"], "--depth: must be at least 1"),
        (["--program", "self-consistency", "--keep", "2"], "--keep: only with --program tree"),
        (["--thought-tokens", "8"], "--thought-tokens: only with --program tree"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*CHAINS, *flags])
    assert caught.value.code == 2 and re.search(said, capsys.readouterr().err)
