"""Which tokens of a text only its own earlier part can foretell: names that come back.

An *occurrence* is a maximal run of letters, digits and underscores of at least `SHORTEST` characters that begins with
no digit, is no keyword and covers two or more tokens. Its first token may be a guess; the others, its *completion*,
follow from the name. An occurrence is

- `distant` if the same name occurred before, and the last time more than D tokens back, first token to first token,
- `near` if it occurred within the last D tokens,
- `fresh` if it did not occur in the window before: what a model completes without copying.
"""

import keyword
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tokenizers import Tokenizer

SHORTEST = 6
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORDS = {k.encode() for k in keyword.kwlist}
KINDS = ("distant", "near", "fresh")


@dataclass(frozen=True)
class Occurrence:
    """One name in a window; tokens `first` … `last` cover it."""

    first: int
    last: int
    kind: str

    @property
    def completion(self) -> range:
        """The tokens after the first."""
        return range(self.first + 1, self.last + 1)


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token of a byte-level tokenizer; special tokens have none."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    # Bytes without a character of their own are written as those from 256 on, in order.
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    special = tokenizer.get_added_tokens_decoder()
    words = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [b"" if i in special else bytes(byte_of[c] for c in word) for i, word in enumerate(words)]


def find_occurrences(pieces: list[bytes], *, distance: int) -> list[Occurrence]:
    """The names of a window, given the bytes of each of its tokens, in order."""
    ends = list(accumulate(map(len, pieces)))
    token_of = [i for i, (begin, end) in enumerate(pairwise([0, *ends])) for _ in range(begin, end)]
    seen: dict[bytes, int] = {}
    found = []
    for match in _NAME.finditer(b"".join(pieces)):
        first, last = token_of[match.start()], token_of[match.end() - 1]
        before = seen.get(match[0])
        seen[match[0]] = first
        if len(match[0]) < SHORTEST or match[0] in _KEYWORDS or first == last:
            continue
        kind = "fresh" if before is None else "distant" if first - before > distance else "near"
        found.append(Occurrence(first, last, kind))
    return found
