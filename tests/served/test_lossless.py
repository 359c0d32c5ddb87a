"""A lossless server answers as a dense one does, whatever happens to its requests, and leaks nothing.

The chain tracer is a trained model, so that drafts are accepted and rejected. SGLang checks its pools itself, here
after every step.
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.fleet import NEXT_PYTHON, interpreter
from support.server import Server, ServerPool, ServerSpec

from .conftest import CHAIN_TRACER

pytestmark = pytest.mark.served

CONTEXT, POOL, DRAFTS, BUDGET = 320, 768, 9, 96
VOCABULARY = range(5, 500)
TIE = 2e-4
"""Logits of float32 differ by so much between batch shapes."""
STRICT = (("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1"),)
SIZES = ("--dtype", "float32", "--max-total-tokens", str(POOL), "--max-running-requests", "16")
SIZES += ("--context-length", str(CONTEXT), "--chunked-prefill-size", "128", "--schedule-conservativeness", "0.3")
DENSE = ServerSpec("dense-chain", CHAIN_TRACER, ("--attention-backend", "torch_native", *SIZES), env=STRICT)


def lossless(page_size: int, release: str = "current", *more: str) -> ServerSpec:
    """A lossless server that drafts in every round."""
    args = ("--attention-backend", "lessismore", "--speculative-algorithm", "LESSISMORE", "--lim-budget", str(BUDGET))
    args += ("--speculative-num-steps", str(DRAFTS), "--lim-vary-drafts", "off", "--page-size", str(page_size))
    name = f"lossless-page{page_size}-{release}{''.join(more)}"
    args += (*SIZES, "--enable-metrics", *more)
    return ServerSpec(name, CHAIN_TRACER, args, env=STRICT, python=interpreter(release))


CASES = {
    "page1": lossless(1),
    "page16": lossless(16),
    "page64-unguided": lossless(64, "current", "--lim-drafts", "unguided"),
    "page16-next": None,
}


@pytest.fixture(scope="module", params=CASES)
def server(request: pytest.FixtureRequest, pool: ServerPool) -> Server:
    """A lossless server that must be sound after every test."""
    spec = CASES[request.param]
    if spec is None:
        if not os.environ.get(NEXT_PYTHON):
            pytest.skip(f"{NEXT_PYTHON} does not name the Python of an environment with the next SGLang release")
        spec = lossless(16, "next")
    return pool.get(spec, beside=DENSE)


@pytest.fixture
def dense(pool: ServerPool, server: Server) -> Server:
    return pool.get(DENSE, beside=server.spec)


@pytest.fixture(autouse=True)
def sound(server: Server) -> Iterator[None]:
    """Nothing leaks: SGLang would have ended the server."""
    yield
    server.flush_cache()
    server.check_alive()
    log = server.log()
    assert "leak" not in log.lower() and "Traceback" not in log


def request_of(number: int) -> dict[str, Any]:
    """A greedy request. Some share a prefix, some stop in the middle of a run of drafts, some have two answers."""
    rng = random.Random(number)
    shared = [random.Random(1).choice(VOCABULARY) for _ in range(150)] if number % 3 == 0 else []
    prompt = [*shared, *(rng.choice(VOCABULARY) for _ in range(rng.randrange(2, 90)))]
    sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    sampling["max_new_tokens"] = rng.choice([1, 2, 5, 9, 10, 11, 24, 40])
    if number % 4 == 1:
        sampling["stop_token_ids"] = rng.sample(VOCABULARY, 60)
    if number % 5 == 2:
        sampling["stop"] = [" 3", ";"]
    if number % 7 == 3:
        sampling["n"] = 2
    return {"input_ids": prompt, "sampling_params": sampling}


def ask(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to one request."""
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    answers = reply.json()
    return answers if isinstance(answers, list) else [answers]


def ask_all(server: Server, bodies: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """As many clients at once."""
    with ThreadPoolExecutor(len(bodies)) as clients:
        return list(clients.map(lambda body: ask(server, body), bodies))


def assert_dense(dense: Server, bodies: list[dict[str, Any]], answers: list[list[dict[str, Any]]]) -> None:
    """All answers are the dense server's, but for ties that rounding turns."""
    for body, mine, wanted in zip(bodies, answers, ask_all(dense, bodies), strict=True):
        for one, other in zip(mine, wanted, strict=True):
            if one["output_ids"] != other["output_ids"]:
                assert_tie(dense, body, one["output_ids"], other["output_ids"])
            else:
                assert one["text"] == other["text"]
                assert one["meta_info"]["finish_reason"] == other["meta_info"]["finish_reason"]


def assert_tie(dense: Server, body: dict[str, Any], mine: list[int], wanted: list[int]) -> None:
    """Where two answers part, the dense model gives both tokens one logit but for rounding."""
    same = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=False)) if a != b)
    prompt = body["input_ids"] + wanted[:same]
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    told = dense.post(
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": sampling,
            "return_logprob": True,
            "token_ids_logprob": [mine[same], wanted[same]],
        },
    ).json()
    first, second = (entry[0] for entry in told["meta_info"]["output_token_ids_logprobs"][0])
    assert abs(first - second) < TIE, f"{mine} is not {wanted}: they part at {same}, by {first - second}"


def test_greedy_answers_are_the_dense_server_s(server: Server, dense: Server) -> None:
    bodies = [request_of(number) for number in range(20)]
    assert_dense(dense, bodies, ask_all(server, bodies))
    # The second time, prompts come out of the radix cache.
    assert_dense(dense, bodies[:8], ask_all(server, bodies[:8]))
    counted = server.counters()
    assert 0 < counted["drafts_accepted"] < counted["drafts_proposed"]
    assert server.lessismore()["lossless"] is True
    assert "sgl_lim_drafts_accepted_total" in server.get("/metrics").text


def test_streamed_pieces_are_the_answer(server: Server, dense: Server) -> None:
    body = {**request_of(5), "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 33, "ignore_eos": True, "stop": ["; v"]}
    with server.post("/generate", body, stream=True) as reply:
        pieces = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
    lengths = [len(piece["output_ids"]) for piece in pieces]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert_dense(dense, [{**body, "stream": False}], [[pieces[-1]]])


def test_a_full_pool_retracts_and_answers_stay(server: Server, dense: Server) -> None:
    # One message brings all of them to the scheduler, so that none can end before the last has come.
    sampling = {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True}
    prompts = [[random.Random(100 + i).choice(VOCABULARY) for _ in range(8)] for i in range(16)]
    answers = ask(server, {"input_ids": prompts, "sampling_params": sampling})
    assert sum(one["meta_info"]["num_retractions"] for one in answers) > 0
    bodies = [{"input_ids": prompt, "sampling_params": sampling} for prompt in prompts]
    assert_dense(dense, bodies, [[one] for one in answers])


def test_the_end_of_the_context_ends_an_answer(server: Server, dense: Server) -> None:
    bodies = [
        {
            "input_ids": [random.Random(200 + i).choice(VOCABULARY) for _ in range(CONTEXT - 40 - i)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 40 + i, "ignore_eos": True},
        }
        for i in range(4)
    ]
    answers = ask_all(server, bodies)
    assert all(one[0]["meta_info"]["finish_reason"]["type"] == "length" for one in answers)
    assert all(one[0]["meta_info"]["completion_tokens"] >= 30 for one in answers)
    assert_dense(dense, bodies, answers)


def test_aborted_requests_leave_the_others_alone(server: Server, dense: Server) -> None:
    bodies = [request_of(number) for number in (0, 3, 4, 6)]

    def hang_up(number: int) -> None:
        body = request_of(30 + number)
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
        with server.post("/generate", {**body, "stream": True}, stream=True) as reply:
            next(line for line in reply.iter_lines() if line)

    with ThreadPoolExecutor(4) as clients:
        hung_up = [clients.submit(hang_up, number) for number in range(4)]
        answers = ask_all(server, bodies)
        for one in hung_up:
            one.result()
    assert_dense(dense, bodies, answers)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_answer(server: Server, dense: Server, mode: str) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True}
    bodies = [{**request_of(number), "sampling_params": sampling} for number in (40, 41, 42, 43)]
    streamed = {**bodies[0], "stream": True}
    with ThreadPoolExecutor(3) as clients, server.post("/generate", streamed, stream=True) as reply:
        others = [clients.submit(ask, server, body) for body in bodies[1:]]
        pieces = (line[6:] for line in reply.iter_lines() if line.startswith(b"data: {"))
        for _ in range(3):
            assert len(json.loads(next(pieces))["output_ids"]) < 80
            assert server.post("/pause_generation", {"mode": mode}).status_code == 200
            assert server.post("/continue_generation", {}).status_code == 200
        *_, last = pieces
        answers = [[json.loads(last)], *(one.result() for one in others)]
    assert_dense(dense, bodies, answers)


def test_weights_that_are_loaded_again_answer_the_same(server: Server, dense: Server) -> None:
    reply = server.post("/update_weights_from_disk", {"model_path": str(CHAIN_TRACER)})
    assert reply.status_code == 200 and reply.json()["success"], reply.text
    bodies = [request_of(number) for number in range(4)]
    assert_dense(dense, bodies, ask_all(server, bodies))
