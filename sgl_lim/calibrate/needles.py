"""Facts hidden in prose and asked for: several in one text, which is read once for all of its questions."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from sgl_lim.evaluate.items import Encoder, Item, ItemError, Suite, length_of, most_that_fits, split_before
from sgl_lim.tasks import filler
from sgl_lim.tasks.needles import DEPTHS, SHORTEST

_WORDS = (
    "river", "candle", "window", "orange", "saddle", "marble", "feather", "anchor", "basket", "thunder", "velvet",
    "hammer", "garden", "pepper", "island", "button", "rocket", "meadow", "pillow", "dragon",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of fact about a thing."""

    what: str
    fact: str
    draw: Callable[[random.Random], str]

    def lead(self, thing: str) -> str:
        """What an answer says before the value."""
        return self.fact.format(what=self.what, thing=thing)

    def question(self, thing: str) -> str:
        """Asks for the value."""
        return f"\n\nQuestion: What is the {self.what} of the {thing}?\nAnswer:"


def _number(digits: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randrange(10 ** (digits - 1), 10**digits))


KINDS = (
    Kind("access code", "The access code of the {thing} is", _number(5)),
    Kind("password", "The password of the {thing} is", lambda rng: " ".join(rng.sample(_WORDS, 3))),
    Kind("phone number", "The phone number of the {thing} is", lambda rng: f"{_number(3)(rng)}-{_number(4)(rng)}"),
    Kind("price", "The price of the {thing} is", _number(4)),
    Kind("colour pair", "The colour pair of the {thing} is", lambda rng: " and ".join(rng.sample(filler.COLOURS, 2))),
)


@dataclass(frozen=True)
class Hidden:
    """A fact in a text."""

    kind: Kind
    thing: str
    value: str
    other: str
    """Another value, which tells where the first one begins in tokens."""
    depth: int

    @property
    def sentence(self) -> str:
        """As it stands in the text."""
        return f"{self.kind.lead(self.thing)} {self.value}."

    def answer(self, value: str) -> str:
        """What a model says that takes this value for the right one."""
        return f" {self.kind.lead(self.thing)} {value}."


def different_kinds(rng: random.Random) -> list[Hidden]:
    """A fact of each kind at each depth, so that nothing else looks like what is asked for."""
    things, depths = filler.names(rng, len(KINDS)), rng.sample(DEPTHS, len(DEPTHS))
    return [_hide(rng, *of) for of in zip(KINDS, things, depths, strict=True)]


def one_kind(rng: random.Random) -> list[Hidden]:
    """Four facts of one kind, which differ in the thing alone."""
    kind = rng.choice(KINDS)
    return [_hide(rng, kind, thing, rng.randint(5, 95)) for thing in filler.names(rng, 4)]


def needle_suite(
    encoder: Encoder, name: str, hide: Callable[[random.Random], list[Hidden]], *, texts: int, context: int, seed: str
) -> Suite:
    """Every fact of so many texts, each asked for behind its text; items of one text follow each other.

    Raises:
        ItemError: the context has no room, or the tokenizer lacks the words.
    """
    items: list[Item] = []
    for index in range(texts):
        rng = random.Random(f"{seed}/{name}/{index}")
        items += _of_one_text(encoder, rng, hide(rng), context)
    return Suite(name, "needles", tuple(items))


def _hide(rng: random.Random, kind: Kind, thing: str, depth: int) -> Hidden:
    value = other = kind.draw(rng)
    while other[0] == value[0]:
        other = kind.draw(rng)
    return Hidden(kind, thing, value, other, depth)


def _of_one_text(encoder: Encoder, rng: random.Random, facts: Sequence[Hidden], context: int) -> list[Item]:
    prose = list(islice(filler.sentences(rng), context // filler.TOKENS_A_SENTENCE))

    deepest_first = sorted(facts, key=lambda one: one.depth, reverse=True)

    def prompt(count: int, asked: Hidden) -> str:
        text = filler.hide([(one.depth, one.sentence) for one in deepest_first], prose[:count])
        return text + asked.kind.question(asked.thing)

    def longest(count: int) -> int:
        return max(length_of(encoder, prompt(count, one) + one.answer(one.value)) for one in facts)

    count = most_that_fits(longest, context, len(prose))
    if count < SHORTEST:
        raise ItemError(f"--context {context}: has no room for hidden facts; raise it")
    return [
        split_before(encoder, prompt(count, one), one.answer(one.value), one.answer(one.other), one.depth)
        for one in facts
    ]
