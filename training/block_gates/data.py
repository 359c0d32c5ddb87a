"""Sequences to train gates on: texts of installed packages, and chain-tracing problems."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from source_reader.corpus import find_sources, read_text, titled
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
    files = [source for source in find_sources(roots) if not source.held_out]
    if not files:
        raise ValueError(f"--roots {' '.join(map(str, roots))}: no text; name folders that packages are installed in")
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


def chain_rows(encoder: Encoder, length: int, seed: int) -> Iterator[list[int]]:
    """Token ids of chain-tracing problems and their solutions, without end; each fills its row or is cut at its end."""
    beginning = encoder.beginning()
    for index in range(1 << 62):
        rng = random.Random(f"{seed}/chains/{index}")
        steps = rng.randint(4, MAX_STEPS)
        row: list[int] = []
        # Facts take six words each, steps eight; words take one token or more.
        facts = min(NUM_NODES, max(steps, (length - 8 * steps) // 6))
        while len(row) < length:
            chain = make_chain(rng, num_facts=facts, num_steps=steps)
            row += beginning + encoder.encode(f"{chain.prompt} {chain.solution}")
        yield row[:length]


def batches(
    rows: Sequence[tuple[float, Iterator[list[int]]]], count: int, seed: int, device: torch.device
) -> Callable[[], Tensor]:
    """Draws int64 [count, length] from several kinds of rows, each with its share."""
    rng = random.Random(f"{seed}/batches")
    shares = [share for share, _ in rows]

    def draw() -> Tensor:
        kinds = rng.choices([kind for _, kind in rows], weights=shares, k=count)
        return torch.tensor([next(kind) for kind in kinds], device=device)

    return draw
