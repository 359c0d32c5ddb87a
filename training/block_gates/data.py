"""Sequences to train gates on: texts of installed packages, and chain-tracing problems."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from source_reader.corpus import Source, find_sources, read_text, titled
from torch import Tensor

from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES, make_chain


class Encoder(Protocol):
    """What makes token ids."""

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        ...

    def beginning(self) -> list[int]:
        """Special tokens before a text."""
        ...


def text_rows(encoder: Encoder, roots: Sequence[Path], length: int, seed: int) -> Iterator[list[int]]:
    """Token ids of windows of text, without end; the files that no model here is trained on are left out.

    Raises:
        ValueError: there is no text.
    """
    files = _texts(tuple(roots))
    rng, beginning = random.Random(f"{seed}/text"), encoder.beginning()
    held: list[int] = []
    while True:
        source = rng.choice(files)
        text = read_text(source.file)
        if text is None:
            continue
        held += encoder.encode(titled(source, text))
        while len(held) >= length - len(beginning):
            yield beginning + held[: length - len(beginning)]
            held = held[length - len(beginning) :]


@cache
def _texts(roots: tuple[Path, ...]) -> list[Source]:
    files = [source for source in find_sources(roots) if not source.held_out]
    if not files:
        raise ValueError(f"--roots {' '.join(map(str, roots))}: no text; name folders that packages are installed in")
    return files


def chain_rows(encoder: Encoder, length: int, seed: int) -> Iterator[list[int]]:
    """Token ids of chain-tracing problems and their solutions, without end; each has as many facts as its row holds."""
    beginning = encoder.beginning()
    for index in range(1 << 62):
        rng = random.Random(f"{seed}/chains/{index}")
        steps = rng.randint(4, MAX_STEPS)
        row: list[int] = []
        # Facts take six words each, steps eight; words take one token or more.
        facts = min(NUM_NODES, max(steps, (length - 8 * steps) // 6))
        while len(row) < length:
            ids = beginning + _problem(encoder, rng, facts, steps)
            if len(ids) <= length or steps == 1:
                row += ids
                continue
            # Fewer facts, and fewer steps where there is a fact for each step alone.
            facts = max(1, min(facts - 1, facts * length // len(ids)))
            steps = min(steps, max(1, facts))
            facts = max(facts, steps, 2)
        yield row[:length]


def _problem(encoder: Encoder, rng: random.Random, facts: int, steps: int) -> list[int]:
    chain = make_chain(rng, num_facts=facts, num_steps=steps)
    return encoder.encode(f"{chain.prompt} {chain.solution}")


def batches(rows: Sequence[tuple[float, Iterator[list[int]]]], count: int, seed: int) -> Callable[[], Tensor]:
    """Draws int64 [count, length], on the CPU, from several kinds of rows, each with its share."""
    rng = random.Random(f"{seed}/batches")
    shares = [share for share, _ in rows]

    def draw() -> Tensor:
        kinds = rng.choices([kind for _, kind in rows], weights=shares, k=count)
        return torch.tensor([next(kind) for kind in kinds])

    return draw


def ahead(draws: Sequence[Callable[[], Tensor]], pool: Executor) -> Callable[[], Tensor]:
    """Draws from each in turn, so that the order depends on no thread; each draws its next one at once, in `pool`.

    Batches are mostly made by the tokenizer, outside Python's lock, and one takes it longer than a GPU learns from it.
    """
    waiting = deque((draw, pool.submit(draw)) for draw in draws)

    def draw_next() -> Tensor:
        draw, drawn = waiting.popleft()
        batch = drawn.result()
        waiting.append((draw, pool.submit(draw)))
        return batch

    return draw_next
