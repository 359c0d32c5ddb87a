"""The reasoning programs against a real server.

The fixture `chain_server` has `.url`, the endpoint of a server whose model has the chain task's vocabulary. Nothing
here needs that model to be good: skill is the accuracy benchmark's business.
"""

import json
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sgl_lim.programs.cli import main
from sgl_lim.programs.endpoint import request_json, server_info
from sgl_lim.programs.problems import chain_problems
from sgl_lim.programs.run_records import read_rows
from sgl_lim.programs.server_stats import parse_server_info
from support.waiting import has_lines, wait_until

pytestmark = pytest.mark.served

SIZES = ["--facts", "64", "--steps", "8"]
MAX_TOKENS = 8 * 8 + 8
PROBLEMS = chain_problems(4, num_facts=64, num_steps=8, seed=0).problems


class Cli:
    """The command line over the server, in this process or, to be killed, in one of its own."""

    def __init__(self, url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.url, self.output, self.summary_path = url, folder / "out.jsonl", folder / "summary.json"
        self.capsys = capsys

    def argv(self, *more: str, chains: int) -> list[str]:
        paths = ["--output", str(self.output), "--summary", str(self.summary_path)]
        return ["--endpoint", self.url, "--chains", str(chains), *SIZES, *paths, *more]

    def start(self, *more: str, chains: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "sgl_lim.programs", *self.argv(*more, chains=chains)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *more: str, chains: int) -> tuple[dict[str, Any], str]:
        """The summary and what was printed."""
        code = main(self.argv(*more, chains=chains))
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(self.summary_path.read_text()), captured.out


@pytest.fixture
def cli(chain_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(chain_server.url, tmp_path, capsys)


def flush_cache(url: str) -> None:
    request = urllib.request.Request(f"{url}/flush_cache", method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def test_solve_in_the_frontend_language(chain_server: Any) -> None:
    from sgl_lim.programs.reasoning import connect, solve

    state = solve.run(
        prompt=PROBLEMS[0].prompt, backend=connect(chain_server.url), max_new_tokens=MAX_TOKENS, temperature=0.0
    )
    (generation,) = state.ret_value
    assert generation.text == state["answer"]
    assert 0 < generation.completion_tokens <= MAX_TOKENS
    assert generation.prompt_tokens == len(PROBLEMS[0].prompt.split()) + 1
    assert generation.finish_reason in ("stop", "length")


def test_the_branches_of_self_consistency_share_a_cold_prompt(chain_server: Any) -> None:
    from sgl_lim.programs.reasoning import connect, self_consistency

    flush_cache(chain_server.url)
    state = self_consistency.run(
        prompt=PROBLEMS[1].prompt,
        num_samples=4,
        backend=connect(chain_server.url),
        max_new_tokens=MAX_TOKENS,
        temperature=1.0,
    )
    generations = state.ret_value
    assert state["answer"] == [generation.text for generation in generations]
    for generation in generations:
        assert generation.cached_tokens >= 0.9 * generation.prompt_tokens, "the branch prefilled the prompt again"


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_request_that_the_server_refuses_is_an_error_with_its_words(chain_server: Any) -> None:
    from sgl_lim.programs.reasoning import GenerationError, connect, self_consistency, solve

    backend = connect(chain_server.url)
    with pytest.raises(GenerationError, match=r"(?i)maximum context length"):
        solve.run(prompt=PROBLEMS[0].prompt, backend=backend, max_new_tokens=10_000_000)
    with pytest.raises(GenerationError, match=r"(?i)maximum context length"):
        self_consistency.run(prompt=PROBLEMS[0].prompt, num_samples=2, backend=backend, max_new_tokens=10_000_000)


def test_the_summary_of_solve(cli: Cli) -> None:
    before = parse_server_info(server_info(cli.url))
    summary, printed = cli.run(chains=4)
    answered = read_rows(cli.output)
    assert {row.id for row in answered} == {problem.id for problem in PROBLEMS}
    assert summary["answered"] == 4 and summary["errors"] == 0
    assert summary["correct"] == sum(row.correct for row in answered)
    assert summary["accuracy_interval"][0] <= summary["accuracy"] <= summary["accuracy_interval"][1]
    assert 0 <= summary["whole_chain_accuracy"] <= 1 and 0 <= summary["word_accuracy"] <= 1
    lengths = [row.samples[0].completion_tokens for row in answered]
    assert summary["generation_tokens"]["mean"] == pytest.approx(sum(lengths) / 4)
    assert summary["output_tokens_per_second"] > 0
    assert 0 <= summary["prefix_cache_hit_share"] < 1
    assert summary["settings"]["model"] == before.model
    if before.counters is None:
        assert (summary["attended_fraction"], summary["attended_note"]) == (1.0, "dense")
    else:
        assert 0 < summary["attended_fraction"] <= 1
        assert summary["attended_counters"]["tokens_dense"] > 0
        assert summary["settings"]["attention"]["budget"] == before.attention["budget"]
    for name in ("accuracy", "generation tokens", "output tokens/s", "share of KV read", "prefix-cache hits"):
        assert name in printed


def test_self_consistency_votes(cli: Cli) -> None:
    flush_cache(cli.url)
    summary, printed = cli.run("--program", "self-consistency", "--samples", "4", chains=2)
    assert summary["samples"] == 8 and "\nmaj@4 " in printed and "\npass@1 " in printed
    assert summary["prefix_cache_hit_share"] >= 0.9
    for row in read_rows(cli.output):
        votes = Counter(sample.answer for sample in row.samples if sample.answer is not None)
        assert row.answer is None if not votes else votes[str(row.answer)] == max(votes.values())


def test_a_tree_shares_every_path_that_it_thinks_on_from(cli: Cli) -> None:
    flush_cache(cli.url)
    shape = ["--branches", "4", "--keep", "2", "--depth", "2", "--thought-tokens", "20"]
    summary, printed = cli.run("--program", "tree", *shape, chains=2)
    assert summary["answered"] == 2 and "on other branches" in printed
    assert summary["prefix_cache_hit_share"] >= 0.9
    for row in read_rows(cli.output):
        (sample,) = row.samples
        assert sample.completion_tokens <= MAX_TOKENS and sample.text == " " + " ".join(sample.text.split())
        assert sample.other_tokens >= 3 * 20, "the branches that were not kept"


def test_budget_forcing_holds_thinking_to_its_budget(cli: Cli) -> None:
    flush_cache(cli.url)
    forced = ["--program", "budget-forcing", "--samples", "2", "--final-text", " answer"]
    summary, printed = cli.run(*forced, "--max-thinking", "20", chains=2)
    assert summary["settings"]["forcing"]["end"] == "", "no token of the model ends thinking"
    assert summary["forcing"] == {"mean_thinking_tokens": 20, "mean_waits": 0, "forced": 4} and "4 of 4 cut" in printed
    assert summary["prefix_cache_hit_share"] >= 0.9
    for row in read_rows(cli.output):
        for sample in row.samples:
            assert len(sample.text.split()) >= 21 and sample.text.split()[20] == "answer"
            assert 20 < sample.completion_tokens <= MAX_TOKENS

    cli.output.unlink()
    early = ["--thinking-end", ";", "--waits", "3", "--wait-text", " +", "--min-thinking", "60", "--max-thinking", "70"]
    summary, _ = cli.run(*forced, *early, chains=2)
    assert summary["answered"] == 2
    for row in read_rows(cli.output):
        for sample in row.samples:
            assert sample.waits == 3 and sample.forced is False, "each step ends with the marker"
            assert sample.text.split().count("+") >= 3 and ";" in sample.text.split()
            assert (sample.thinking_tokens or 0) < sample.completion_tokens <= MAX_TOKENS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_is_resumed(cli: Cli, number: signal.Signals) -> None:
    chains = 8
    process = cli.start("--concurrency", "1", chains=chains)
    try:
        wait_until(lambda: has_lines(cli.output, 2), "two answered problems", beside=process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    survivors = read_rows(cli.output)
    assert 2 <= len(survivors) < chains, "the kill came too late to test anything"
    if number == signal.SIGINT:
        assert f"{len(survivors)} of {chains} problems are answered" in err
    whole = b"".join(row.to_json().encode() + b"\n" for row in survivors)
    cli.output.write_bytes(whole[:-10])
    summary, _ = cli.run(chains=chains)
    assert summary["answered"] == chains
    assert summary["invocation"]["items"] == chains - len(survivors) + 1, "all but the torn row were kept"
    assert [row.id for row in read_rows(cli.output)[: len(survivors) - 1]] == [row.id for row in survivors[:-1]]


def test_an_interrupted_clients_requests_leave_the_server(cli: Cli) -> None:
    process = cli.start("--concurrency", "4", "--max-tokens", "3000", chains=4)
    try:
        wait_until(lambda: running_requests(cli.url) > 0, "a running request", beside=process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        wait_until(lambda: not running_requests(cli.url), "the end of requests whose client is gone")
    finally:
        process.kill()


def running_requests(url: str) -> int:
    loads = request_json(f"{url}/v1/loads")["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
