"""Types of command-line arguments: they convert a text, or say what was expected and what was given."""

import argparse
import math
from collections.abc import Callable
from urllib.parse import urlsplit


def url(text: str) -> str:
    """An argument's type: an endpoint, without a trailing slash."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    try:
        parts = urlsplit(text)
        known = parts.hostname and (parts.port is None or parts.port) and not any(map(str.isspace, text))
    except ValueError:  # brackets that do not match, or a port that is no port
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"must be such as http://127.0.0.1:30000, got {text!r}")
    if "@" in parts.netloc:  # not shown: the part before it is a password
        raise argparse.ArgumentTypeError("must have no user or password in it; an API key is given by --api-key")
    return text.rstrip("/")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument's type: an integer in a range."""

    def convert(text: str) -> int:
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, {expected}, got {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {value}")
        return value

    return convert


def top_k(text: str) -> int:
    """An argument's type: as many tokens, or -1 for all; servers fail every request that has 0."""
    value = integer(-1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, or -1 for no limit, got 0")
    return value


def number(low: float, high: float, *, or_low: bool = True) -> Callable[[str], float]:
    """An argument's type: a number in a range, whose lower end is outside without `or_low`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (value == low and not or_low):
            expected = f"from {low:g}" if or_low else f"above {low:g}, up"
            raise argparse.ArgumentTypeError(f"must be a number {expected} to {high:g}, got {text!r}")
        return value

    return convert
