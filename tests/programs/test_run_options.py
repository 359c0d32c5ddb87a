"""The command line: defaults, and errors that name the flag."""

import re
from pathlib import Path

import pytest
from stub_endpoint import StubEndpoint

from sgl_lim.programs.problems import chain_problems, jsonl_problems, needle_problems
from sgl_lim.programs.run_options import ForcingOptions, Options, parse
from sgl_lim.programs.server_stats import parse_server_info
from sgl_lim.programs.token_limits import LimitError, max_tokens

CHAINS = ["--chains", "4", "--output", "o"]
SPARED = 6  # of the context and of the KV pool, by SGLang
NEEDLES = ["--needles", "4", "--output", "o"]
FILE = ["--problems", "p.jsonl", "--output", "o"]
CONSISTENT = ["--program", "self-consistency"]
FORCED = ["--program", "budget-forcing"]


def test_solve_is_greedy_and_self_consistency_samples() -> None:
    solve, consistent = parse(CHAINS), parse([*CHAINS, *CONSISTENT])
    assert (solve.samples, solve.temperature, solve.top_p) == (None, 0.0, 1.0)
    assert (consistent.samples, consistent.temperature, consistent.top_p) == (8, 0.6, 0.95)
    assert (solve.facts, solve.steps, solve.seed, solve.concurrency) == (330, 48, 0, 8)


def test_several_samples_are_sampled_whatever_the_program() -> None:
    options = parse([*CHAINS, "--samples", "4"])
    assert (options.program, options.samples, options.temperature, options.top_p) == ("solve", 4, 0.6, 0.95)
    assert parse([*CHAINS, "--samples", "1"]) == parse(CHAINS)
    forced = parse([*CHAINS, *FORCED, "--samples", "2"])
    assert forced.samples == 2 and forced.forcing == ForcingOptions(None, None, 2, "Wait", "\n\nFinal answer:", None)
    assert parse([*CHAINS, *FORCED]).temperature == 0.0


def test_flags_are_taken() -> None:
    options = parse([*CHAINS, *CONSISTENT, "--samples", "3", "--temperature", "1", "--endpoint", "http://host:1/"])
    assert (options.samples, options.temperature, options.endpoint) == (3, 1.0, "http://host:1")


def test_a_named_template_means_chat() -> None:
    assert parse([*FILE, "--chat-template", "chatml"]).chat
    assert not parse(FILE).chat


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--output", "o"], "--chains --needles --problems"),
        (["--chains", "1"], "--output"),
        ([*CHAINS, "--problems", "p"], "--problems"),
        (["--chains", "0", "--output", "o"], "--chains"),
        ([*CHAINS, "--facts", "401"], "--facts"),
        ([*CHAINS, "--steps", "65"], "--steps"),
        ([*CHAINS, "--facts", "10", "--steps", "11"], "--steps"),
        ([*CHAINS, "--facts", "10"], "--steps"),
        ([*CHAINS, "--limit", "3"], "--limit"),
        ([*CHAINS, "--prompt-template", "{problem}"], "--prompt-template"),
        ([*CHAINS, "--chat"], "--chat"),
        ([*FILE, "--facts", "3"], "--facts"),
        ([*FILE, "--keys", "3"], "--keys: only with --needles"),
        ([*CHAINS, "--sentences", "30"], "--sentences: only with --needles"),
        ([*NEEDLES, "--facts", "30"], "--facts: only with --chains"),
        ([*NEEDLES, "--limit", "3"], "--limit: only with --problems"),
        ([*NEEDLES, "--sentences", "4"], "--sentences"),
        ([*NEEDLES, "--keys", "17"], "--keys"),
        ([*FILE, "--seed", "3"], "--seed: only with --chains or --needles"),
        ([*FILE, "--prompt-template", "solve"], "--prompt-template"),
        ([*FILE, "--prompt-template", ""], "--prompt-template"),
        ([*FILE, "--limit", "0"], "--limit"),
        ([*FILE, "--samples", "0"], "--samples"),
        ([*FILE, "--samples", "4", "--temperature", "0"], "--temperature: must be above 0 with 4 samples"),
        ([*FILE, "--data-dir", "d"], "--data-dir"),
        ([*CHAINS, "--data-dir", "d"], "--data-dir"),
        ([*FILE, "--waits", "3"], "--waits: only with --program budget-forcing"),
        ([*FILE, *FORCED, "--waits", "-1"], "--waits"),
        ([*FILE, *FORCED, "--wait-text", ""], "--wait-text"),
        ([*FILE, *FORCED, "--final-text", ""], "--final-text"),
        ([*FILE, *FORCED, "--min-thinking", "9", "--max-thinking", "8"], "--min-thinking"),
        ([*FILE, *CONSISTENT, "--samples", "1"], "--samples"),
        ([*FILE, *CONSISTENT, "--temperature", "0"], "--temperature"),
        ([*FILE, "--temperature", "warm"], "--temperature"),
        ([*FILE, "--temperature", "nan"], "--temperature"),
        ([*FILE, "--top-p", "1.5"], "--top-p"),
        ([*FILE, "--top-p", "0"], "--top-p: must be a number above 0"),
        ([*FILE, "--top-k", "0"], "--top-k: must be at least 1, or -1"),
        ([*FILE, "--max-tokens", "0"], "--max-tokens"),
        ([*FILE, "--concurrency", "0"], "--concurrency"),
        ([*FILE, "--endpoint", "127.0.0.1:30000"], "--endpoint"),
        ([*FILE, "--endpoint", "http://"], "--endpoint"),
        ([*FILE, "--endpoint", "http://[::1"], "--endpoint"),
        ([*FILE, "--endpoint", "http://host:99999"], "--endpoint"),
        ([*FILE, "--endpoint", "http://a host"], "--endpoint"),
        ([*FILE, "--program", "guess"], "--program"),
        ([*FILE, "--summary", "./o"], "--summary"),
    ],
)
def test_a_bad_argument_is_named(argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    assert re.search(rf"error: .*{flag}", capsys.readouterr().err)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "one two three", "answer": "1"}\n{"problem": "four", "answer": "1"}\n')
    return path


def limit(options: Options, context: int | None) -> int:
    if options.chains is not None:
        source = chain_problems(options.chains, num_facts=options.facts, num_steps=options.steps, seed=0)
    elif options.needles is not None:
        source = needle_problems(options.needles, sentences=options.sentences, keys=1, seed=0, chat=options.chat)
    else:
        assert options.problems is not None
        source = jsonl_problems(Path(options.problems), template="{problem}")
    info = {
        "max_req_input_len": context,
        "max_total_num_tokens": 100 + SPARED,
        "internal_states": [],
        "model_path": "m",
    }
    return max_tokens(options, source.problems, parse_server_info(info))


def test_chains_get_what_they_need(stub: StubEndpoint) -> None:
    argv = ["--endpoint", stub.url, "--chains", "2", "--facts", "9", "--steps", "5", "--output", "o"]
    assert limit(parse(argv), 4096) == 48
    assert limit(parse(argv), None) == 48
    assert limit(parse([*argv, "--max-tokens", "7"]), 4096) == 7
    with pytest.raises(LimitError, match=r"--steps/--facts.*59 tokens.*48.*takes 100 for both.*--max-total-tokens"):
        limit(parse(argv), 100)
    with pytest.raises(LimitError, match=r"--max-tokens.*500"):
        limit(parse([*argv, "--max-tokens", "500"]), 500)
    with pytest.raises(LimitError, match=r"takes 99 for both; start it with a larger --context-length"):
        limit(parse(argv), 99)
    stub.can_tokenize = False
    assert limit(parse(argv), 100) == 48


def test_needles_get_a_sentence_or_two(stub: StubEndpoint) -> None:
    argv = ["--endpoint", stub.url, "--needles", "2", "--sentences", "20", "--output", "o"]
    assert limit(parse(argv), 4096) == limit(parse(argv), None) == 64
    with pytest.raises(LimitError, match=r"--sentences.*may take 64.*takes 100 for both"):
        limit(parse(argv), 100)


def test_chains_get_more_where_a_word_is_several_tokens(stub: StubEndpoint) -> None:
    argv = ["--endpoint", stub.url, "--facts", "9", "--steps", "5", "--output", "o"]
    stub.tokens_per_word = 2
    solution = chain_problems(1, num_facts=9, num_steps=5, seed=0).problems[0].solution
    assert solution is not None
    tokens = 2 * len(solution.split())
    assert {limit(parse([*argv, "--chains", n]), 4096) for n in ("1", "3")} == {tokens + tokens // 8}


def test_mathematics_gets_what_the_context_leaves(stub: StubEndpoint, questions: Path) -> None:
    argv = ["--endpoint", stub.url, "--problems", str(questions), "--output", "o"]
    assert limit(parse(argv), 1000) == 997
    assert limit(parse(argv), 50_000) == 32768
    assert limit(parse(argv), None) == 32768
    assert limit(parse([*argv, "--chat-template", "chatml"]), 1000) == 997 - 64
    stub.can_tokenize = False
    assert limit(parse(argv), 1000) == 1000 - len("one two three")
    assert limit(parse([*argv, "--max-tokens", "40000"]), 1000) == 40000
