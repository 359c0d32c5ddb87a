"""What is decoded: windows of text, hidden facts and chains, as token ids of a prompt and what follows it."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from sgl_lim.evaluate import sources
from sgl_lim.tasks import filler
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES, make_chain
from sgl_lim.tasks.needles import DEPTHS, SHORTEST, draw_needle

KEYS = {"needle": 1, "four_keys": 4}
"""Facts in a prompt, by suite."""


class ItemError(ValueError):
    """A task cannot be made at this size or with this tokenizer; the message names the flag."""


class Encoder(Protocol):
    """What makes token ids."""

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        ...

    def beginning(self) -> list[int]:
        """Special tokens before a text."""
        ...


@dataclass(frozen=True)
class Item:
    """A prompt and the right tokens behind it; the first of these comes from the prefill."""

    prompt: list[int]
    right: list[int]
    scored_from: int = 0
    """Place in `right` of the first token that counts: those before it are given."""
    depth: int | None = None
    """One of `DEPTHS`, where a fact is hidden."""
    ends: bool = False
    """Whether one more token counts, the one that full attention says behind the right ones: does the text end?"""

    @property
    def fed(self) -> list[int]:
        """The tokens that decode steps are fed. What follows the last one counts only of an item that ends."""
        return self.right if self.ends else self.right[:-1]

    def __len__(self) -> int:
        """Tokens at its end."""
        return len(self.prompt) + len(self.right)


@dataclass(frozen=True)
class Suite:
    """Items of one kind."""

    name: str
    task: str  # text, needles or chains
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Sizes:
    """How large items are."""

    items: int
    context: int  # tokens at the end of an item, at most
    decoded: int  # of a text, tokens that are scored
    steps: int  # of a chain
    facts: int | None  # of a chain; None: as many as fit
    seed: int


def text_suite(encoder: Encoder, name: str, texts: Sequence[str], sizes: Sizes) -> Suite:
    """Windows of a text that do not overlap, as many as there are up to `sizes.items`.

    Raises:
        ItemError: the text is shorter than one window.
    """
    beginning, tokens, needed = encoder.beginning(), [], sizes.items * sizes.context
    for text in sources.shuffled(texts, f"{sizes.seed}/{name}"):
        tokens += encoder.encode(text)
        if len(tokens) >= needed:
            break
    length = sizes.context - len(beginning)
    windows = [tokens[first : first + length] for first in range(0, len(tokens) - length + 1, length)][: sizes.items]
    if not windows:
        raise ItemError(f"text {name} has {len(tokens)} tokens; --context {sizes.context} asks for more: lower it")
    if len(windows) < sizes.items:
        print(f"text {name} has {len(windows)} windows, not {sizes.items}", file=sys.stderr)
    # One more is predicted by the prefill alone, and does not count.
    cut = length - sizes.decoded - 1
    return Suite(name, "text", tuple(Item(beginning + w[:cut], w[cut:], scored_from=1) for w in windows))


def needle_suite(encoder: Encoder, name: str, sizes: Sizes) -> Suite:
    """A fact at each depth in turn, among filler and, with four keys, among other facts.

    Raises:
        ItemError: the context has no room, or the tokenizer lacks the words.
    """
    items = []
    for index in range(sizes.items):
        rng = random.Random(f"{sizes.seed}/{name}/{index}")
        items.append(_needle(encoder, rng, KEYS[name], DEPTHS[index % len(DEPTHS)], sizes.context))
    return Suite(name, "needles", tuple(items))


def _needle(encoder: Encoder, rng: random.Random, keys: int, depth: int, context: int) -> Item:
    needle = draw_needle(rng, keys=keys, depth=depth)
    prose = list(islice(filler.sentences(rng), context // filler.TOKENS_A_SENTENCE))

    def prompt(count: int) -> str:
        return f"{needle.text(prose[:count])}\n\nQuestion: {needle.question}\nAnswer:"

    def answer(code: int) -> str:
        return f" {needle.lead} {code}"

    count = most_that_fits(lambda n: length_of(encoder, prompt(n) + answer(needle.code)), context, len(prose))
    if count < SHORTEST:
        raise ItemError(f"--context {context}: has no room for a hidden fact; raise it")
    # No digit of the other number is the right one.
    return split_before(encoder, prompt(count), answer(needle.code), answer(99_999 - needle.code), depth)


def chain_suite(encoder: Encoder, sizes: Sizes) -> Suite:
    """Chain-tracing problems of one size.

    Raises:
        ItemError: they do not fit the context.
    """

    def problem(index: int, facts: int) -> Item:
        chain = make_chain(random.Random(f"{sizes.seed}/{index}"), num_facts=facts, num_steps=sizes.steps)
        return replace(split(encoder, chain.prompt, f" {chain.solution}"), ends=True)

    def longest(facts: int) -> int:
        return max(len(problem(index, facts)) for index in range(sizes.items))

    least, facts = max(2, sizes.steps), sizes.facts
    if facts is None:
        facts = least + most_that_fits(lambda n: longest(least + n), sizes.context, NUM_NODES - least)
    if not least <= facts <= NUM_NODES or sizes.steps > MAX_STEPS or longest(facts) > sizes.context:
        raise ItemError(
            f"--steps {sizes.steps} in {facts} facts do not fit --context {sizes.context}; there are 1 to {MAX_STEPS} "
            f"steps, and as many facts or more, up to {NUM_NODES}: lower --steps or raise --context"
        )
    return Suite("chains", "chains", tuple(problem(index, facts) for index in range(sizes.items)))


def most_that_fits(length: Callable[[int], int], room: int, most: int) -> int:
    """The largest n from 0 to `most` whose length is within the room; 0 if none is. Lengths increase with n.

    A length may cost the encoding of a whole context, so few are asked for: texts grow almost evenly, and the next n to
    look at is where the room would end if they did.
    """
    low, high, probe = 0, most, (most + 1) // 2
    while low < high:
        found = length(probe)
        if found <= room:
            low = probe
        else:
            high = probe - 1
        probe = min(max(low + 1, probe + round((room - found) * probe / max(found, 1))), high)
    return low


def length_of(encoder: Encoder, text: str) -> int:
    """Tokens of an item whose prompt and right tokens are this text."""
    return len(encoder.beginning()) + len(encoder.encode(text))


def split(encoder: Encoder, prompt: str, right: str) -> Item:
    """An item of two texts, encoded as one, so that tokens are those of a text that goes on."""
    whole = encoder.encode(prompt + right)
    cut = common(whole, encoder.encode(prompt))
    return Item(encoder.beginning() + whole[:cut], whole[cut:])


def split_before(encoder: Encoder, prompt: str, right: str, wrong: str, depth: int) -> Item:
    """An item as `split` makes it, of which only the tokens count that a wrong answer does not begin with."""
    item = split(encoder, prompt, right)
    whole = encoder.encode(prompt + wrong)
    first = len(item.prompt) - len(encoder.beginning())
    return replace(item, scored_from=common(item.right, whole[first:]), depth=depth)


def common(one: list[int], other: list[int]) -> int:
    """Leading tokens that are equal."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
