"""Chain tracing: follow `n` links through a few hundred shuffled facts and keep a running sum modulo 100.

A problem is one cycle through `num_facts` nodes, written as shuffled facts, so every node has exactly one successor
and no node repeats within a chain of at most `num_facts` steps: a solver has to retrieve each fact from the context
and cannot copy it from what it already wrote.

    prompt    v17 -> v203 + 4 ; v5 -> v17 + 2 ; … ? v17 steps 3 :
    solution  v17 -> v203 + 4 = 4 ; v203 -> v9 + 9 = 13 ; v9 -> v31 + 1 = 14 ; answer 14

Only the standard library is used, so that the generator runs wherever training or a client runs.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

NUM_NODES = 400
MODULUS = 100
MAX_STEPS = 64
MAX_INCREMENT = 9

_ANSWER = re.compile(r"answer\s+(\d+)")


@dataclass(frozen=True)
class ChainProblem:
    """One problem. `prompt` and `solution` are text without the `<bos>` and `<eos>` the tokenizer adds."""

    prompt: str
    solution: str
    answer: str
    num_facts: int
    num_steps: int


def make_chain(rng: random.Random, *, num_facts: int, num_steps: int) -> ChainProblem:
    """Draw one problem.

    Args:
        rng: source of randomness; equal states give equal problems.
        num_facts: facts in the context, 2 … `NUM_NODES`.
        num_steps: links to follow, 1 … min(`MAX_STEPS`, `num_facts`).

    Raises:
        ValueError: a size is out of range.
    """
    if not 2 <= num_facts <= NUM_NODES:
        raise ValueError(f"num_facts must be 2..{NUM_NODES}, got {num_facts}")
    if not 1 <= num_steps <= min(MAX_STEPS, num_facts):
        raise ValueError(f"num_steps must be 1..{min(MAX_STEPS, num_facts)} for {num_facts} facts, got {num_steps}")
    cycle = rng.sample(range(NUM_NODES), num_facts)
    increments = [rng.randint(1, MAX_INCREMENT) for _ in cycle]
    facts = [f"v{node} -> v{cycle[(i + 1) % num_facts]} + {increments[i]} ;" for i, node in enumerate(cycle)]
    rng.shuffle(facts)
    steps, total = [], 0
    for i in range(num_steps):
        total = (total + increments[i]) % MODULUS
        steps.append(f"v{cycle[i]} -> v{cycle[(i + 1) % num_facts]} + {increments[i]} = {total} ;")
    return ChainProblem(
        prompt=f"{' '.join(facts)} ? v{cycle[0]} steps {num_steps} :",
        solution=f"{' '.join(steps)} answer {total}",
        answer=str(total),
        num_facts=num_facts,
        num_steps=num_steps,
    )


def generate_chains(count: int, *, num_facts: int, num_steps: int, seed: int) -> Iterator[ChainProblem]:
    """Yield `count` problems; problem `i` depends on `(seed, i)` and the sizes only, not on `count`."""
    for index in range(count):
        yield make_chain(random.Random(f"{seed}/{index}"), num_facts=num_facts, num_steps=num_steps)


def parse_answer(text: str) -> str | None:
    """The number after the last `answer` in a generation, without leading zeros, or None if there is none."""
    found = _ANSWER.findall(text)
    return str(int(found[-1])) if found else None


def matching_words(text: str, solution: str) -> tuple[int, int]:
    """How many words of `solution` the generation has at the same place, and how many words `solution` has."""
    written, wanted = text.split(), solution.split()
    return sum(a == b for a, b in zip(written, wanted, strict=False)), len(wanted)


def vocabulary() -> list[str]:
    """The 512 words of the task in token-id order: specials and punctuation, numbers 0 … 99, nodes."""
    words = ["<pad>", "<bos>", "<eos>", "->", "+", "=", ";", "?", "steps", ":", "answer", "<unk>"]
    return words + [str(n) for n in range(MODULUS)] + [f"v{n}" for n in range(NUM_NODES)]
