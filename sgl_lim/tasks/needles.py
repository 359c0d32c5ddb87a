"""Needles: a code is hidden among prose about other things, and asked for at the end.

    prompt    … Later, the baker tasted the broth. The access code of the copper lantern is 48213. … What is the
              access code of the copper lantern?
    answer    48213

With several keys, as many things have a code, at places of their own, and one of them is asked for.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from sgl_lim.tasks import filler

DEPTHS = (10, 30, 50, 70, 90)
"""Percent of the prose before the code that is asked for."""
MAX_KEYS = 16
SHORTEST = len(DEPTHS)
"""Sentences of prose, at least."""
_CODES = (10_000, 99_999)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Needle:
    """Things and their codes; the first is asked for."""

    things: tuple[str, ...]
    codes: tuple[int, ...]
    places: tuple[int, ...]
    """Percent of the prose before each."""

    @property
    def code(self) -> int:
        """The right answer."""
        return self.codes[0]

    @property
    def depth(self) -> int:
        """Percent of the prose before the code that is asked for."""
        return self.places[0]

    @property
    def lead(self) -> str:
        """How a sentence begins that ends with the right code."""
        return f"The access code of the {self.things[0]} is"

    @property
    def question(self) -> str:
        """What is asked."""
        return f"What is the access code of the {self.things[0]}?"

    def text(self, prose: Sequence[str]) -> str:
        """Sentences of prose with the facts between them."""
        facts = [f"The access code of the {n} is {c}." for n, c in zip(self.things, self.codes, strict=True)]
        return filler.hide(sorted(zip(self.places, facts, strict=True), reverse=True), prose)


def draw_needle(rng: random.Random, *, keys: int, depth: int) -> Needle:
    """Draw things, codes and places.

    Args:
        rng: source of randomness; equal states give equal needles.
        keys: things with a code, 1 … `MAX_KEYS`.
        depth: percent of the prose before the code that is asked for, 0 … 100.

    Raises:
        ValueError: a number is out of range.
    """
    if not 1 <= keys <= MAX_KEYS:
        raise ValueError(f"keys must be 1..{MAX_KEYS}, got {keys}")
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must be 0..100, got {depth}")
    things = tuple(filler.names(rng, keys))
    codes = tuple(rng.sample(range(*_CODES), keys))
    return Needle(things, codes, (depth, *(rng.randint(5, 95) for _ in things[1:])))


def generate_needles(count: int, *, sentences: int, keys: int, seed: int) -> Iterator[tuple[Needle, str]]:
    """`count` needles, each with its text, by turns at each of `DEPTHS`.

    Needle `i` depends on the sizes and `(seed, i)` only.

    Raises:
        ValueError: a number is out of range.
    """
    if sentences < SHORTEST:
        raise ValueError(f"sentences must be {SHORTEST} or more, got {sentences}")
    for index in range(count):
        rng = random.Random(f"{seed}/{keys}/{index}")
        needle = draw_needle(rng, keys=keys, depth=DEPTHS[index % len(DEPTHS)])
        yield needle, needle.text(list(islice(filler.sentences(rng), sentences)))


def parse_code(text: str) -> str | None:
    """The first number of a generation, or None if it has none: what comes behind it may be about other things."""
    found = _NUMBER.search(text)
    return None if found is None else found.group()
