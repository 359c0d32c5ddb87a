"""Texts that every installation has, and files of the user's: what next tokens are compared on."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

_LEAST_CHARACTERS = 2000
"""Shorter modules are mostly headers."""


class SourceError(ValueError):
    """There is no such text here; the message says what to give instead."""


def english() -> list[str]:
    """Pages of Python's language reference, which the standard library carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SourceError("this Python has no pydoc_data with its reference; give a text with --text") from error
    return [topics[name] for name in sorted(topics)]


def python() -> list[str]:
    """Source files of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    found = [text for text in texts if len(text) >= _LEAST_CHARACTERS]
    if not found:
        raise SourceError(f"{folder} has no Python sources; give a text with --text")
    return found


def from_files(paths: Sequence[Path]) -> list[str]:
    """Texts of the user's.

    Raises:
        SourceError: a file cannot be read, or is empty.
    """
    found = []
    for path in paths:
        try:
            found.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"--text {path}: {error}") from error
        if not found[-1].strip():
            raise SourceError(f"--text {path}: is empty")
    return found


def shuffled(texts: Sequence[str], seed: str) -> list[str]:
    """The texts in an order that depends on the seed alone."""
    return random.Random(seed).sample(list(texts), len(texts))
