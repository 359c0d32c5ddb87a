"""A small pool under pressure: chunked and mixed prefill, retraction, aborts, flushes. Nothing may leak or crash.

SGLang checks its pools itself: whenever it is idle (fatal by default) and, with the switch set here, after every step.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from support.agreement import same_tokens
from support.fleet import LAYERS, Fleet, random_prompt
from support.server import Answer, Server, ServerPool, ServerSpec
from support.waiting import wait_until

pytestmark = pytest.mark.served

BUDGET = 96
STRICT = (("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1"),)
SETTINGS = {
    "attention-backend": "lessismore",
    "lim-budget": BUDGET,
    "lim-selection-layers": "1,3",
    "lim-aggregate": "max",
    "dtype": "float32",
    "max-total-tokens": 3200,
    "max-running-requests": 64,
    "chunked-prefill-size": 64,
    "schedule-conservativeness": 0.3,
}
SHORT_JOBS = [(random_prompt(10 + 7 * i, 500 + i), BUDGET - 10 - 7 * i) for i in range(8)]
LONG_JOBS = [(random_prompt(length, 510 + length), 24) for length in (150, 205, 300, 411)]
# Admission counts on requests stopping early. These do not, and together they need more than the pool.
GREEDY_JOBS = [(random_prompt(8, 520 + i), BUDGET - 8) for i in range(48)]


class Stream(NamedTuple):
    """A streamed answer under way."""

    reply: requests.Response
    lines: Iterator[bytes]


def yaml_spec(name: str, fleet: Fleet, folder: Path, **more: object) -> ServerSpec:
    """A server whose settings all come from a YAML file."""
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**SETTINGS, **more}.items()))
    return ServerSpec(name, fleet.model("gqa"), ("--config", str(path)), env=STRICT)


@pytest.fixture(scope="module")
def specs(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServerSpec]:
    folder = tmp_path_factory.mktemp("churn")
    return {
        "chunked": yaml_spec("chunked", fleet, folder, **{"page-size": 16}),
        "mixed": yaml_spec("mixed", fleet, folder, **{"enable-mixed-chunk": True}),
    }


@pytest.fixture(params=["chunked", "mixed"], scope="module")
def churned(request: pytest.FixtureRequest, pool: ServerPool, specs: dict[str, ServerSpec]) -> Server:
    """A server that must be sound after every test of this module."""
    return pool.get(specs[request.param], beside=specs["mixed"])


@pytest.fixture(autouse=True)
def sound(churned: Server) -> Iterator[None]:
    before = ask(churned, LONG_JOBS[:1])
    yield
    churned.flush_cache()
    assert same_tokens(before, ask(churned, LONG_JOBS[:1]))
    churned.check_alive()
    log = churned.log()
    assert "leak" not in log.lower()
    assert "Traceback" not in log


def ask(server: Server, jobs: Sequence[tuple[list[int], int]]) -> list[Answer]:
    """Answers to clients that come at once. Without log-probabilities, which keep SGLang from mixing steps."""
    return server.generate_apart(jobs, return_logprob=False)


def ask_in_turn(server: Server, jobs: Sequence[tuple[list[int], int]]) -> list[Answer]:
    """Answers to the same, each alone."""
    return [ask(server, [job])[0] for job in jobs]


def within_budget(jobs: Sequence[tuple[list[int], int]], answers: Sequence[Answer]) -> list[Answer]:
    """Answers whose context never exceeded the budget."""
    return [a for (prompt, tokens), a in zip(jobs, answers, strict=True) if len(prompt) + tokens <= BUDGET]


def test_yaml_settings_arrive(churned: Server) -> None:
    block = churned.lessismore()
    assert (block["budget"], block["selection_layers"], block["aggregate"]) == (BUDGET, [1, 3], "max")


def test_long_and_short_requests_together_answer_as_alone(churned: Server) -> None:
    jobs = [*LONG_JOBS, *SHORT_JOBS]
    alone = ask_in_turn(churned, jobs)
    churned.flush_cache()
    together = ask(churned, jobs)
    assert not any(answer.retractions for answer in together)
    assert [len(answer.tokens) for answer in together] == [tokens for _, tokens in jobs]
    if "mixed" in churned.spec.name:
        # A decode row of a mixed step runs dense, so only what fits the budget does not depend on its company.
        together, alone = within_budget(jobs, together), within_budget(jobs, alone)
        assert len(alone) == len(SHORT_JOBS)
    assert same_tokens(together, alone)


def test_mixed_steps_happen_where_they_are_enabled(churned: Server) -> None:
    churned.flush_cache()
    before = churned.counters()
    (prompt, tokens), (long_prompt, _) = SHORT_JOBS[0], LONG_JOBS[-1]
    decoding = stream(churned, prompt, tokens)
    ask(churned, [(long_prompt, 1)])
    assert finish_reason(decoding) == "length"
    churned.flush_cache()
    grown = churned.counted_since(before)
    assert grown["requests"] == 1, "the long request has but the token of its prefill"
    # Steps that are mixed with a prefill are dense, and not counted.
    dense = LAYERS * sum(range(len(prompt) + 1, len(prompt) + tokens))
    if "mixed" in churned.spec.name:
        assert grown["tokens_dense"] < dense
    else:
        assert grown["tokens_dense"] == dense


def test_retracted_requests_answer_as_alone(churned: Server) -> None:
    tokens = GREEDY_JOBS[0][1]
    prompts = [prompt for prompt, _ in [*GREEDY_JOBS, *LONG_JOBS]]
    together = churned.generate(prompts, tokens, return_logprob=False)
    assert [len(answer.tokens) for answer in together] == [tokens] * len(prompts)
    assert "KV cache pool is full. Retract requests." in churned.log()
    fitting = list(zip(GREEDY_JOBS, together, strict=False))
    looked_at = [(job, answer) for i, (job, answer) in enumerate(fitting) if answer.retractions or i < 4]
    assert len(looked_at) > 4, "no request within the budget was retracted"
    churned.flush_cache()
    assert same_tokens([answer for _, answer in looked_at], ask_in_turn(churned, [job for job, _ in looked_at]))


def stream(server: Server, prompt: list[int], tokens: int = 400, **fields: object) -> Stream:
    """A generation whose first tokens have arrived. By default it is long, but a few fit the pool."""
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": prompt, "stream": True, "sampling_params": sampling, **fields}
    reply = requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120)
    lines = (line for line in reply.iter_lines() if line)
    assert next(lines).startswith(b"data: {")
    return Stream(reply, lines)


def finish_reason(stream: Stream) -> str:
    """Read a stream to its end: why it ended."""
    *_, last = [line for line in stream.lines if line.startswith(b"data: {")]
    return json.loads(last.removeprefix(b"data: "))["meta_info"]["finish_reason"]["type"]


def test_aborted_requests_leave_and_others_are_not_disturbed(churned: Server) -> None:
    alone = ask_in_turn(churned, SHORT_JOBS[:2])
    doomed = [stream(churned, prompt, rid=f"doomed-{i}") for i, (prompt, _) in enumerate(LONG_JOBS[:3])]
    with ThreadPoolExecutor(2) as clients:
        others = [clients.submit(ask, churned, [job]) for job in SHORT_JOBS[:2]]
        for i in range(len(doomed)):
            assert churned.post("/abort_request", {"rid": f"doomed-{i}"}).status_code == 200
        assert [finish_reason(one) for one in doomed] == ["abort"] * len(doomed)
        assert same_tokens([answer for other in others for answer in other.result()], alone)


def test_abort_all(churned: Server) -> None:
    doomed = [stream(churned, prompt) for prompt, _ in LONG_JOBS[:2]]
    assert churned.post("/abort_request", {"abort_all": True}).status_code == 200
    assert [finish_reason(one) for one in doomed] == ["abort"] * len(doomed)


def test_requests_of_clients_that_hang_up_leave(churned: Server) -> None:
    for prompt, _ in LONG_JOBS:
        stream(churned, prompt).reply.close()
    # A flush is refused while anything runs.
    wait_until(lambda: churned.post("/flush_cache").status_code == 200, "the end of requests whose clients are gone")


def test_flush_empties_the_cache_and_rows_are_reused(churned: Server) -> None:
    first = ask(churned, LONG_JOBS[:2] + SHORT_JOBS[:2])
    churned.flush_cache()
    for _ in range(3):
        again = ask(churned, SHORT_JOBS[:2] + LONG_JOBS[:2])
        if "mixed" not in churned.spec.name:
            assert same_tokens([*again[2:], *again[:2]], first)
        churned.flush_cache()
    assert ask(churned, LONG_JOBS[:1])[0].cached_tokens == 0
