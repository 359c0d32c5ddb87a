"""Budget forcing against a stub endpoint: what is dropped, said and asked, and what is counted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import Reply, StubEndpoint

from sgl_lim.programs.cli import main
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_records import Generation, dense_reads, read_rows
from sgl_lim.programs.thinking_budget import ThinkingBudget

PROMPT = "think of it"
BUDGET = ThinkingBudget(least=6, most=10, waits=2, wait_text=" Wait", final_text=" so:", end="</think>")
Finish = dict[str, Any]
LENGTH: Finish = {"type": "length", "length": 1}
EOS: Finish = {"type": "stop", "matched": 2}
END: Finish = {"type": "stop", "matched": "</think>"}


class Script:
    """Replies by the text that they follow; each has a reason why it ended."""

    def __init__(
        self, stub: StubEndpoint, monkeypatch: pytest.MonkeyPatch, lines: dict[str, tuple[str, Finish]]
    ) -> None:
        self.stub = stub
        stub.answer = lambda text: lines[text.removeprefix(PROMPT)][0]
        generate = stub.generate

        def ended(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            status, body = generate(request)
            if request["sampling_params"]["max_new_tokens"] and status == 200:
                body["meta_info"]["finish_reason"] = lines[request["text"].removeprefix(PROMPT)][1]
            return status, body

        monkeypatch.setattr(stub, "generate", ended)

    def run(self, budget: ThinkingBudget = BUDGET, samples: int | None = None, **more: Any) -> list[Generation]:
        from sgl_lim.programs.reasoning import connect, make_ask

        ask = make_ask(
            connect(self.stub.url), num_samples=samples, chat=False, forcing=budget, max_new_tokens=14, **more
        )
        return ask(PROMPT)

    @property
    def asked(self) -> list[tuple[str, int]]:
        requests = [r for r in self.stub.generate_requests if r["sampling_params"]["max_new_tokens"]]
        return [(r["text"].removeprefix(PROMPT), r["sampling_params"]["max_new_tokens"]) for r in requests]


@pytest.fixture
def script(stub: StubEndpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    return lambda lines: Script(stub, monkeypatch, lines)


def test_an_early_end_is_dropped_and_a_late_one_is_answered(script: Callable[..., Script]) -> None:
    told = script(
        {
            "": (" a b", END),
            " a b Wait": (" c d e f", END),
            " a b Wait c d e f</think>": (" answer 7", EOS),
        }
    )
    (generation,) = told.run()
    # Eight tokens of thinking may follow two of ten; 14 - 6 are left to the answer.
    assert told.asked == [("", 10), (" a b Wait", 8), (" a b Wait c d e f</think>", 8)]
    assert generation.text == " a b Wait c d e f</think> answer 7" and generation.finish_reason == "stop"
    assert (generation.completion_tokens, generation.thinking_tokens, generation.waits) == (8, 6, 1)
    assert generation.forced is False
    assert generation.prompt_tokens == 3 + 6 + 10
    assert generation.tokens_dense == dense_reads(3, 2) + dense_reads(6, 4) + dense_reads(10, 2)
    stops = [r["sampling_params"].get("stop") for r in told.stub.generate_requests]
    assert stops == [["</think>"], ["</think>"], []]


def test_waits_run_out(script: Callable[..., Script]) -> None:
    told = script(
        {
            "": (" a", END),
            " a Wait": (" b", END),
            " a Wait b Wait": (" c", END),
            " a Wait b Wait c</think>": (" 7", EOS),
        }
    )
    (generation,) = told.run()
    assert generation.text == " a Wait b Wait c</think> 7" and generation.waits == 2


def test_thinking_that_does_not_end_is_cut_and_the_answer_is_forced(script: Callable[..., Script]) -> None:
    thinking = " w" * 10
    told = script({"": (thinking, LENGTH), f"{thinking}\n</think> so:": (" 7", EOS)})
    (generation,) = told.run()
    assert told.asked == [("", 10), (f"{thinking}\n</think> so:", 4)]
    assert generation.text == f"{thinking}\n</think> so: 7" and generation.forced
    assert (generation.completion_tokens, generation.thinking_tokens, generation.waits) == (11, 10, 0)


def test_without_a_marker_the_end_of_the_generation_ends_the_thinking(script: Callable[..., Script]) -> None:
    budget = ThinkingBudget(least=4, most=10, waits=2, wait_text=" Wait", final_text=" so:", end="")
    told = script({"": (" 8", EOS), " 8 Wait": (" no it is 7", EOS)})
    (generation,) = told.run(budget)
    assert generation.text == " 8 Wait no it is 7" and len(told.asked) == 2, "the answer is in it"
    assert (generation.waits, generation.forced, generation.completion_tokens) == (1, False, 5)


def test_without_a_marker_a_cut_has_none(script: Callable[..., Script]) -> None:
    budget = ThinkingBudget(least=4, most=10, waits=2, wait_text=" Wait", final_text=" so:", end="")
    told = script({"": (" w" * 10, LENGTH), " w" * 10 + " so:": (" 7", EOS)})
    assert told.run(budget)[0].text == " w" * 10 + " so: 7"


def test_an_end_without_its_marker_is_an_end_too(script: Callable[..., Script]) -> None:
    told = script({"": (" a", EOS), " a Wait": (" b c d e f", EOS)})
    (generation,) = told.run()
    assert generation.text == " a Wait b c d e f" and len(told.asked) == 2


def test_a_full_context_is_no_cut(script: Callable[..., Script]) -> None:
    told = script({"": (" a b", LENGTH)})
    (generation,) = told.run()
    assert generation.text == " a b" and generation.finish_reason == "length" and generation.forced is False


def test_samples_share_the_prompt_and_do_not_wait_for_each_other(script: Callable[..., Script]) -> None:
    told = script({"": (" a b c d e f", END), " a b c d e f</think>": (" 7", EOS)})
    generations = told.run(samples=3, temperature=0.7)
    assert [generation.text for generation in generations] == [" a b c d e f</think> 7"] * 3
    assert [r["sampling_params"]["max_new_tokens"] for r in told.stub.generate_requests[:1]] == [0]
    assert sorted(size for _, size in told.asked) == [8, 8, 8, 10, 10, 10]


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("samples", [None, 3])
def test_a_failing_request_is_an_error(
    stub: StubEndpoint, samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_lim.programs.reasoning import GenerationError

    told = Script(stub, monkeypatch, {"": (" a", END)})
    stub.answer = lambda text: (500, "pool full") if text.endswith("Wait") else " a"
    with pytest.raises(GenerationError, match="pool full"):
        told.run(samples=samples)


PROBLEMS = chain_problems(2, num_facts=6, num_steps=2, seed=0).problems


def argv(stub: StubEndpoint, folder: Path, *more: str) -> list[str]:
    paths = ["--output", str(folder / "out.jsonl"), "--summary", str(folder / "summary.json")]
    source = ["--chains", "2", "--facts", "6", "--steps", "2"]
    return ["--endpoint", stub.url, *source, *paths, "--program", "budget-forcing", *more]


def answered(prompt: str) -> Reply:
    return " : answer " + next(problem.answer for problem in PROBLEMS if prompt.startswith(problem.prompt))


@pytest.mark.parametrize(
    ("tokens", "flags", "end"),
    [
        ([], [], ""),
        (["</think>"], [], "</think>"),
        (["</think>"], ["--thinking-end", ""], ""),
        ([], ["--thinking-end", "v0"], "v0"),
    ],
)
def test_the_runner_knows_what_ends_thinking(
    stub: StubEndpoint, tmp_path: Path, tokens: list[str], flags: list[str], end: str
) -> None:
    stub.tokens, stub.answer = tokens, answered
    assert main(argv(stub, tmp_path, *flags)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["forcing"] == {
        "least": 21,
        "most": 21,
        "waits": 2,
        "wait_text": "Wait",
        "final_text": "\n\nFinal answer:",
        "end": end,
    }
    assert summary["accuracy"] == 1.0 and summary["forcing"] == {
        "mean_thinking_tokens": 9,
        "mean_waits": 2,
        "forced": 0,
    }
    assert all(
        row.samples[0].waits == 2 and row.samples[0].completion_tokens == 9 for row in read_rows(tmp_path / "out.jsonl")
    )
    assert all((r["sampling_params"].get("stop") == [end]) is bool(end) for r in stub.generate_requests)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-thinking", "24"], "--max-thinking: thinking of 24 tokens leaves too little of the 24"),
        (["--min-thinking", "22"], "--min-thinking: thinking of 22 tokens leaves too little of the 24"),
        (["--max-tokens", "1"], "--max-thinking: thinking of 0 tokens"),
    ],
)
def test_a_budget_without_room_for_an_answer_is_refused(
    stub: StubEndpoint, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(stub, tmp_path, *flags)) == 2
    assert said in capsys.readouterr().err
    assert not stub.generate_requests and not (tmp_path / "out.jsonl").exists()


def test_a_server_that_cannot_say_what_ends_thinking(
    stub: StubEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.can_tokenize = False
    assert main(argv(stub, tmp_path)) == 2
    assert re.search("--thinking-end: the server does not say", capsys.readouterr().err)


def test_what_is_said_must_fit_into_the_context(
    stub: StubEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = max(len(problem.prompt.split()) for problem in PROBLEMS)
    stub.context = longest + 24 + 64 + 2 + 3
    stub.answer = answered
    assert main(argv(stub, tmp_path)) == 0
    stub.context -= 1
    assert main(argv(stub, tmp_path)) == 2
    assert "--steps/--facts" in capsys.readouterr().err
