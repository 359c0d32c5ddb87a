"""LoRA: requests with several adapters and none in one batch, beside SGLang's dense backend."""

from pathlib import Path

import pytest

from support.agreement import largest_difference, same_tokens
from support.fleet import COMMON_ARGS, NEW_TOKENS, Fleet, random_prompt
from support.server import Answer, Server, ServerPool, ServerSpec
from support.tiny_adapter import write_adapters

pytestmark = pytest.mark.served

ADAPTERS = ("first", "second")
BUDGET, COVERED, BEYOND = 512, 400, 900
ROUNDING = 1e-3
"""Of log-probabilities in float32; another adapter moves them by tenths."""
Servers = tuple[Server, Server]


@pytest.fixture(scope="module")
def servers(fleet: Fleet, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Servers:
    """The dense backend and ours, with two adapters of the same model."""
    model, folder = fleet.model("gqa"), tmp_path_factory.mktemp("adapters")
    args = (
        "--dtype",
        "float32",
        *COMMON_ARGS,
        "--enable-lora",
        "--lora-backend",
        "torch_native",
        "--lora-paths",
        *write_adapters(folder, model, ADAPTERS),
    )
    ours = ("--attention-backend", "lessismore", "--lim-budget", str(BUDGET), "--lim-selection-layers", "1,3")
    dense = ServerSpec("lora-dense", Path(model), ("--attention-backend", "torch_native", *args))
    sparse = ServerSpec("lora-lessismore", Path(model), (*ours, *args))
    return pool.get(dense, beside=sparse), pool.get(sparse)


def ask(server: Server, prompts: list[list[int]], adapters: list[str | None]) -> list[Answer]:
    return server.generate(prompts, NEW_TOKENS, lora_path=adapters)


def test_answers_are_those_of_the_dense_backend(servers: Servers) -> None:
    """Two adapters and none in one batch, over one prompt and over others; the budget covers them."""
    dense, ours = servers
    same = random_prompt(COVERED, 1)
    prompts = [same, same, same, *(random_prompt(length, length) for length in (30, 150, 333))]
    adapters: list[str | None] = [None, *ADAPTERS, *ADAPTERS, None]
    expected, answers = ask(dense, prompts, adapters), ask(ours, prompts, adapters)
    assert len({answer.tokens for answer in expected[:3]}) == 3, "adapters that change nothing test nothing"
    assert same_tokens(answers, expected)
    assert largest_difference(answers, expected) < ROUNDING


def test_prefix_groups_are_of_one_adapter(servers: Servers) -> None:
    """The same prompt: rows of one adapter share its KV slots, rows of different ones share none."""
    _, ours = servers
    ours.flush_cache()
    prompt = random_prompt(BEYOND, 2)
    alone = [ask(ours, [prompt], [adapter])[0] for adapter in (None, *ADAPTERS)]
    before = ours.counters()
    apart = ask(ours, [prompt] * 3, [None, *ADAPTERS])
    between = ours.counters()
    assert between["rows_grouped"] == before["rows_grouped"]
    together = ask(ours, [prompt] * 4, [*ADAPTERS, *ADAPTERS])
    assert ours.counters()["rows_grouped"] >= between["rows_grouped"] + 4 * (NEW_TOKENS - 2)
    assert same_tokens(apart, alone) and same_tokens(together, [*alone[1:], *alone[1:]])
    assert between["tokens_attended"] < between["tokens_dense"]
