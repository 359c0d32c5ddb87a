"""Chain-tracing problems (`sgl_lim.tasks.chains`) as rows of the model's own tokens.

A row holds problems of many sizes one after another. Rows of some length also hold *spread* problems: one context, then
several questions about it, each after a piece of other text, so that facts are wanted from thousands of tokens back.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sgl_lim.tasks.chains import MAX_INCREMENT, MAX_STEPS, MODULUS, NUM_NODES

from .tokenizer import BOS, EOS

FACT, QUESTION, STEP, ENDING = 8, 6, 10, 3  # tokens: `v1 -> v2 + 3 ;`, `? v1 steps 9 :`, a step, `answer 14<eos>`
SPREAD_ROOM = 1500  # tokens that a spread problem needs at least
PIECE_TOKENS = (30, 1200)  # of other text before a question


@dataclass(frozen=True)
class Facts:
    """One cycle through nodes and what each link adds, as `make_chain` draws them."""

    cycle: list[int]
    increments: list[int]

    @classmethod
    def draw(cls, rng: random.Random, count: int) -> "Facts":
        """`count` facts, 2 … `NUM_NODES`."""
        cycle = rng.sample(range(NUM_NODES), count)
        return cls(cycle, [rng.randint(1, MAX_INCREMENT) for _ in cycle])

    def _link(self, i: int) -> str:
        count = len(self.cycle)
        return f"v{self.cycle[i % count]} -> v{self.cycle[(i + 1) % count]} + {self.increments[i % count]}"

    def context(self, rng: random.Random) -> str:
        """The facts, shuffled."""
        order = rng.sample(range(len(self.cycle)), len(self.cycle))
        return " ".join(f"{self._link(i)} ;" for i in order)

    def question(self, start: int, steps: int) -> tuple[str, str]:
        """Question and solution of a chain of `steps` links from the node at place `start` of the cycle."""
        words, total = [], 0
        for i in range(start, start + steps):
            total = (total + self.increments[i % len(self.cycle)]) % MODULUS
            words.append(f"{self._link(i)} = {total} ;")
        return f"? v{self.cycle[start]} steps {steps} :", f"{' '.join(words)} answer {total}"


class ChainWriter:
    """Writes rows. Words are encoded once: a chain's words are pieces of their own whatever stands beside them."""

    def __init__(self, tokenizer: Tokenizer, other_text: NDArray[np.uint16]) -> None:
        self._tokenizer, self._text = tokenizer, other_text
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a chain's text without `<bos>`; equal to the tokenizer's."""
        ids: list[int] = []
        for i, word in enumerate(text.split(" ")):
            if i or word:
                piece = f" {word}" if i else word
                if piece not in self._known:
                    self._known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
                ids += self._known[piece]
        return ids

    def row(self, rng: random.Random, length: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """`length` tokens that begin with `<bos>`, and which of them are targets: solutions, `<eos>` and other text."""
        row = _Row(length)
        row.add([BOS], wanted=False)
        while row.room > 0:
            if row.room >= SPREAD_ROOM and length >= 2 * SPREAD_ROOM and rng.random() < 0.5:
                self._spread(rng, row)
            elif row.room >= 2 * FACT + QUESTION + STEP + ENDING:
                self._problem(rng, row)
            else:
                row.add(self._piece(rng, row.room), wanted=True)
        return row.tokens, row.wanted

    def _problem(self, rng: random.Random, row: "_Row") -> None:
        rest = row.room - QUESTION - ENDING
        count = _log_uniform(rng, 2, min(NUM_NODES, (rest - STEP) // FACT))
        facts = Facts.draw(rng, count)
        row.add(self.encode(facts.context(rng)), wanted=False)
        self._answer(rng, row, facts, min(MAX_STEPS, count, (rest - FACT * count) // STEP))

    def _spread(self, rng: random.Random, row: "_Row") -> None:
        facts = Facts.draw(rng, _log_uniform(rng, 8, min(NUM_NODES, row.room // 2 // FACT)))
        row.add(self.encode(facts.context(rng)), wanted=False)
        for _ in range(rng.randint(1, 6)):
            piece = self._piece(rng, _log_uniform(rng, *PIECE_TOKENS))
            steps = min(MAX_STEPS, len(facts.cycle), (row.room - len(piece) - QUESTION - ENDING) // STEP)
            if steps < 1:
                return
            row.add(piece, wanted=True)
            self._answer(rng, row, facts, steps)

    def _answer(self, rng: random.Random, row: "_Row", facts: Facts, most: int) -> None:
        steps = most if rng.random() < 0.4 else rng.randint(1, most)
        question, solution = facts.question(rng.randrange(len(facts.cycle)), steps)
        row.add(self.encode(f" {question}"), wanted=False)
        row.add([*self.encode(f" {solution}"), EOS], wanted=True)

    def _piece(self, rng: random.Random, length: int) -> list[int]:
        start = rng.randrange(max(1, len(self._text) - length))
        return [int(t) for t in self._text[start : start + length].tolist()]


class _Row:
    """A row being filled; what does not fit is cut off."""

    def __init__(self, length: int) -> None:
        self.tokens = np.full(length, EOS, dtype=np.uint16)
        self.wanted = np.zeros(length, dtype=np.bool_)
        self._used = 0

    @property
    def room(self) -> int:
        return len(self.tokens) - self._used

    def add(self, ids: list[int], *, wanted: bool) -> None:
        kept = ids[: self.room]
        self.tokens[self._used : self._used + len(kept)] = kept
        self.wanted[self._used : self._used + len(kept)] = wanted
        # An empty piece must not keep a row from ending.
        self._used += max(1, len(kept))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return low if high <= low else min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
