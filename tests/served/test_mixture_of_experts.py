"""Qwen3-MoE: its attention is Qwen3's. A budget that covers the context is dense, and a smaller one saves."""

import pytest

from support.agreement import largest_difference, same_tokens
from support.fleet import COMMON_ARGS, LAYERS, NEW_TOKENS, random_prompt
from support.server import Server, ServerPool, ServerSpec
from support.tiny_model import write_tiny_moe

pytestmark = pytest.mark.served

BUDGET = 256
ROUNDING = 1e-3
"""Of log-probabilities in float32."""


@pytest.fixture(scope="module")
def servers(pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Server]:
    """The dense backend and ours."""
    model = write_tiny_moe(tmp_path_factory.mktemp("moe"), layers=LAYERS)
    args = ("--dtype", "float32", *COMMON_ARGS)
    ours = ("--attention-backend", "lessismore", "--lim-budget", str(BUDGET), "--lim-selection-layers", "1,3")
    dense = ServerSpec("moe-dense", model, ("--attention-backend", "torch_native", *args))
    sparse = ServerSpec("moe-lessismore", model, (*ours, *args))
    return pool.get(dense, beside=sparse), pool.get(sparse)


def test_a_budget_that_covers_the_context_is_dense(servers: tuple[Server, Server]) -> None:
    dense, ours = servers
    prompts = [random_prompt(length, length) for length in (1, 40, 130, BUDGET - NEW_TOKENS)]
    expected, answers = dense.generate(prompts, NEW_TOKENS), ours.generate(prompts, NEW_TOKENS)
    assert same_tokens(answers, expected)
    assert largest_difference(answers, expected) < ROUNDING


def test_longer_contexts_are_decoded_sparsely(servers: tuple[Server, Server]) -> None:
    dense, ours = servers
    prompts = [random_prompt(length, length) for length in (400, 777, 1200)]
    before = ours.counters()
    answers = ours.generate(prompts, NEW_TOKENS)
    counted = ours.counted_since(before)
    lengths = [len(prompt) + step for prompt in prompts for step in range(1, NEW_TOKENS)]
    assert counted["tokens_dense"] == LAYERS * sum(lengths)
    # Layer 0 is dense, 1 and 3 attend to everything and select, 2, 4 and 5 attend to the set.
    assert counted["tokens_attended"] + counted["tokens_shared"] == 3 * sum(lengths) + 3 * BUDGET * len(lengths)
    expected = dense.generate(prompts, NEW_TOKENS)
    # The first token is the prefill's.
    assert [answer.tokens[0] for answer in answers] == [answer.tokens[0] for answer in expected]
    assert not same_tokens(answers, expected), "weights are drawn so that a set changes what is said"
    assert same_tokens(answers, [ours.generate_one(prompt, NEW_TOKENS) for prompt in prompts])
