"""Batches of requests as forests of shared prefixes: `1x4096/4x12288/8x256`."""

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Forest:
    """Levels from the root, (nodes under each node before, tokens of each); the last level is the requests' own."""

    levels: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "Forest":
        """`16x32768`: 16 requests of 32768 tokens; `1x32768/16x256`: 16 with 256 of their own behind one prefix.

        Raises:
            ArgumentTypeError: the text is nothing of the kind.
        """
        levels = text.split("/")
        if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", level) for level in levels):
            raise argparse.ArgumentTypeError(
                f"expected REQUESTSxTOKENS such as 16x32768, or PREFIXESxTOKENS/REQUESTSxTOKENS, got {text!r}"
            )
        return cls(tuple((int(count), int(tokens)) for count, tokens in (level.split("x") for level in levels)))

    def __str__(self) -> str:
        return "/".join(f"{count}x{tokens}" for count, tokens in self.levels)

    @property
    def batch(self) -> int:
        """Requests."""
        return math.prod(count for count, _ in self.levels)

    @property
    def context(self) -> int:
        """Tokens of each request, those it shares included."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def own(self) -> int:
        """Tokens that each request shares with no other."""
        return self.levels[-1][1]

    @property
    def prefixes(self) -> str:
        """The levels above the requests, as they are written; blank if nothing is shared."""
        return "/".join(str(self).split("/")[:-1])

    def shared(self) -> Iterator[tuple[int, int, int]]:
        """Of each node above the requests, level by level: tokens, and the range of requests that it is shared by."""
        nodes = 1
        for count, tokens in self.levels[:-1]:
            nodes *= count
            rows = self.batch // nodes
            for node in range(nodes):
                yield tokens, node * rows, (node + 1) * rows
