"""A public checkpoint that was trained by others, and that nobody calibrated: is it right by default?

It has to find hidden numbers with sparse layers as it does densely.
"""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from sgl_lim.checkpoints import Unreachable, ensure
from sgl_lim.settings.layers import SPACED, SPACED_ATTENDS, spaced_layers
from support.server import Server, ServerPool, ServerSpec

pytestmark = pytest.mark.served

BUDGET = 256  # of 1,580 tokens
SENTENCES = 130
CITIES = ("Berlin", "Oslo", "Cairo", "Lima", "Delhi", "Quito")
ARGS = ("--attention-backend", "lessismore", "--lim-budget", str(BUDGET), "--dtype", "bfloat16")
ARGS += ("--max-total-tokens", "16384", "--max-running-requests", "8")
WHEN = ("On Monday", "After the rain", "In early spring", "Before dinner", "Late at night", "When the bells rang")
WHO = ("baker", "miller", "teacher", "sailor", "weaver", "doctor", "farmer", "painter", "judge", "smith")
DID = ("sold", "carried", "found", "repaired", "counted", "painted", "borrowed", "returned", "measured", "lost")
WHAT = ("bread", "wooden chairs", "blue lamps", "old maps", "ropes", "glass bowls", "apples", "wheels", "letters")
WHERE = ("in the market", "by the river", "near the old bridge", "behind the church", "on the hill", "in a garden")


@dataclass(frozen=True)
class Needle:
    """A prompt in whose text a number is hidden, and that number."""

    prompt: str
    number: str


def needles() -> list[Needle]:
    """One for each city, from the beginning of the text to its end. The text around them is the same."""
    rng = random.Random("needles")
    parts = (WHO, DID, WHAT, WHERE)
    text = [f"{rng.choice(WHEN)} the {' '.join(rng.choice(part) for part in parts)}." for _ in range(SENTENCES)]
    found = []
    for index, city in enumerate(CITIES):
        number, at = str(rng.randrange(10_000, 100_000)), round((index + 0.5) / len(CITIES) * SENTENCES)
        sentences = [*text[:at], f"The secret number of {city} is {number}.", *text[at:]]
        found.append(Needle(f"{' '.join(sentences)}\n\nWhat is the secret number of {city}?", number))
    return found


def answer(server: Server, needle: Needle) -> str:
    """What the model says, greedily, in its own chat template."""
    body = {"messages": [{"role": "user", "content": needle.prompt}], "temperature": 0, "max_tokens": 20, "stop": ["."]}
    reply = server.post("/v1/chat/completions", {"model": "smollm2", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def answers(server: Server, wanted: Sequence[Needle]) -> list[str]:
    """The last needle first: what its text shares with the others is then in the radix cache."""
    last = answer(server, wanted[-1])
    with ThreadPoolExecutor(len(wanted)) as clients:
        return [*clients.map(lambda needle: answer(server, needle), wanted[:-1]), last]


@pytest.fixture(scope="module")
def specs() -> tuple[ServerSpec, ServerSpec]:
    """A dense server, and one with the layers that an unknown checkpoint gets."""
    try:
        folder = ensure("smollm2")
    except Unreachable as error:
        pytest.skip(str(error))
    dense = ServerSpec("smollm2-dense", folder, (*ARGS, "--lim-method", "full"))
    return dense, ServerSpec("smollm2-sparse", folder, ARGS)


def test_the_user_is_told_what_an_unknown_checkpoint_gets(
    specs: tuple[ServerSpec, ServerSpec], pool: ServerPool
) -> None:
    server = pool.get(specs[1], beside=specs[0])
    info, log = server.lessismore(), server.log()
    layers = list(spaced_layers(len(info["layer_roles"])))
    assert (info["selection_layers"], info["selection_layers_from"]) == (layers, SPACED)
    assert info["selection_attends"] == SPACED_ATTENDS and info["selection_layers_measured"] is None
    told = "this checkpoint was never measured"
    command = f"`python -m sgl_lim.calibrate --model-path {server.spec.model}`"
    assert log.count(told) == log.count(command) == 1
    # SGLang's own dump of its arguments would bury it.
    assert log.index("server_args=ServerArgs(") < log.index(told) < log.index("sgl-lim is on:")
    assert told not in pool.get(specs[0]).log()


def test_sparse_layers_lose_no_needle(specs: tuple[ServerSpec, ServerSpec], pool: ServerPool) -> None:
    wanted = needles()
    dense, sparse = pool.get(specs[0], beside=specs[1]), pool.get(specs[1])
    with ThreadPoolExecutor(2) as sides:
        said = list(sides.map(lambda server: answers(server, wanted), (dense, sparse)))
    found = [[needle.number in text for needle, text in zip(wanted, texts, strict=True)] for texts in said]
    assert sum(found[0]) >= len(wanted) - 1, f"dense decode itself is wrong: {said[0]}"
    assert sum(found[1]) >= sum(found[0]), said
    read, counted = dense.counters(), sparse.counters()
    assert read["tokens_attended"] == read["tokens_dense"] > 0
    assert counted["tokens_attended"] < 0.45 * counted["tokens_dense"]
