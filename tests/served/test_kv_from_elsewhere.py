"""KV that no prefill on the server wrote: loaded from SGLang's host cache, or sent by a prefill server.

Methods that keep something of KV slots learn it when such a request first decodes (`sgl_lim/serving/arrivals.py`).
"""

import pytest

from support.fleet import COMMON_ARGS, HEAD_DIM, HEADS, LAYERS, NEW_TOKENS, Fleet, random_prompt
from support.gates import gates_for
from support.server import Server, ServerPool, ServerSpec

pytestmark = pytest.mark.served

METHODS = {
    "pages": ("--lim-method", "quest"),
    "gates": ("--lim-method", "seerattention"),
    "sets-that-outlive-a-step": (
        *("--lim-selection-layers", "1,3", "--lim-selection-interval", "4", "--lim-early-sets", "on"),
        *("--lim-sinks", "4", "--lim-recency", "0.25"),
    ),
}
POOL, PAGE, BUDGET = 2048, 16, 256
FAKE_PREFILL_SERVER = "2.2.2.2"  # SGLang's warm-up has the same
CACHING = (
    *("--enable-hierarchical-cache", "--hicache-ratio", "4", "--max-total-tokens", str(POOL)),
    *("--max-running-requests", "4"),
)
RECEIVING = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake", *COMMON_ARGS)
SERVERS = [*((name, CACHING) for name in METHODS), ("pages", RECEIVING), ("gates", RECEIVING)]
"""In the order in which the tests want them: each starts beside the next one, if it has to."""


def server_of(fleet: Fleet, pool: ServerPool, name: str, how: tuple[str, ...]) -> Server:
    """The server of a method to which KV comes in one of the two ways."""
    this, *later = SERVERS[SERVERS.index((name, how)) :]
    return pool.get(spec_of(fleet, *this), beside=spec_of(fleet, *later[0]) if later else None)


def spec_of(fleet: Fleet, name: str, how: tuple[str, ...]) -> ServerSpec:
    args = ("--attention-backend", "lessismore", "--dtype", "float32", "--lim-budget", str(BUDGET))
    args += ("--page-size", str(PAGE), *METHODS[name], *how)
    if name == "gates":
        args += ("--lim-gates", gates_for(LAYERS, *HEADS["gqa"], HEAD_DIM))
    return ServerSpec(f"elsewhere-{name}-{'decode' if how is RECEIVING else 'cache'}", fleet.model("gqa"), args)


@pytest.mark.parametrize("name", METHODS)
def test_answers_from_a_host_cache_are_those_of_a_prefill(fleet: Fleet, pool: ServerPool, name: str) -> None:
    """The pool holds two of the prompts, so each of them is in host memory alone when it comes again."""
    server = server_of(fleet, pool, name, CACHING)
    prompts = [random_prompt(length, 500 + length) for length in (700, 900, 640, 800)]
    first = [server.generate_one(prompt, NEW_TOKENS) for prompt in prompts]
    again = [server.generate_one(prompt, NEW_TOKENS) for prompt in prompts]
    assert all(answer.cached_tokens == 0 for answer in first)
    assert [answer.cached_tokens for answer in again] == [(len(p) - 1) // PAGE * PAGE for p in prompts]
    assert [answer.tokens for answer in again] == [answer.tokens for answer in first]
    counters = server.counters()
    assert counters["tokens_attended"] < 0.8 * counters["tokens_dense"] and counters["warm_starts"] == 0


@pytest.mark.parametrize("name", ["pages", "gates"])
def test_a_decode_server_serves_what_was_sent(fleet: Fleet, pool: ServerPool, name: str) -> None:
    """SGLang's `fake` transfer sends nothing: no answer means anything, but all of a request's steps run."""
    server = server_of(fleet, pool, name, RECEIVING)
    before = server.counters()
    prompts = [random_prompt(length, length) for length in (33, 700, 512, 900)]
    answers = answers_of(server, prompts)
    server.flush_cache()
    answers += answers_of(server, prompts)
    assert [len(tokens) for tokens in answers] == [NEW_TOKENS] * 2 * len(prompts)
    counters = server.counted_since(before)
    assert counters["requests"] == 2 * len(prompts) and counters["requests_dense"] == 2
    # The first token is the prefill server's. Dense layers are among all layers.
    lengths = [len(prompt) + step for prompt in prompts for step in range(1, NEW_TOKENS)]
    assert counters["tokens_dense"] == 2 * 6 * sum(lengths)
    assert counters["tokens_attended"] < 0.8 * counters["tokens_dense"]


def answers_of(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of a decode server to prompts that arrive together."""
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    rooms = {"bootstrap_host": [FAKE_PREFILL_SERVER] * len(prompts), "bootstrap_room": list(range(len(prompts)))}
    reply = server.post("/generate", {"input_ids": prompts, "sampling_params": sampling, **rooms})
    assert reply.status_code == 200, reply.text
    return [item["output_ids"] for item in reply.json()]
