"""The API key of a protected server: `--api-key`, else the environment. No message, record or command line has it."""

import argparse
import os
import shlex
from collections.abc import Collection, Sequence
from itertools import pairwise

FLAG = "--api-key"
VARIABLES = ("SGLANG_API_KEY", "OPENAI_API_KEY")
"""Looked at in this order where the flag is not given."""


class ApiKeyError(RuntimeError):
    """The environment's key cannot be sent; the message names the variable, and not the key."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--api-key`; without it the namespace has None, and the environment is looked at when a server is asked."""
    parser.add_argument(
        FLAG,
        type=_sendable,
        metavar="KEY",
        help=f"of a protected server (default: ${VARIABLES[0]}, else ${VARIABLES[1]})",
    )


def effective(given: str | None) -> str | None:
    """The key to send: the one given, else the environment's, else None.

    Raises:
        ApiKeyError: the environment's cannot stand in a header.
    """
    if given is not None:
        return given
    for name in VARIABLES:
        if os.environ.get(name, "").strip():
            try:
                return _sendable(os.environ[name])
            except argparse.ArgumentTypeError as error:
                raise ApiKeyError(f"environment variable {name}: {error}") from None
    return None


def headers(given: str | None) -> dict[str, str]:
    """The header that carries the effective key; none without a key. Raises `ApiKeyError` as `effective` does."""
    key = effective(given)
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def advice(status: int, *, had_key: bool) -> str:
    """What to do about an answer of 401 or 403, to be read after it; blank for another status."""
    if status not in (401, 403):
        return ""
    asks = "the server refuses the API key that it got: give the right one" if had_key else "give the server's API key"
    return f"; {asks} by {FLAG} or in the environment variable {VARIABLES[0]} or {VARIABLES[1]}"


def command(module: str, argv: Sequence[str]) -> str:
    """The command `python -m module …` for a person to repeat, with a place for the key instead of the key."""
    flag = argparse.ArgumentParser(add_help=False)
    add_flag(flag)
    given, others = flag.parse_known_args(list(argv))
    place = f"{VARIABLES[0]}=… " if given.api_key is not None else ""
    return place + shlex.join(["python", "-m", module, *others])


def keys_in(arguments: Sequence[str]) -> set[str]:
    """The keys in launch arguments of a server."""
    flags = FLAG, "--admin-api-key"
    parts = [argument.partition("=") for argument in arguments]
    joined = {value for flag, equals, value in parts if equals and flag in flags}
    return (joined | {value for flag, value in pairwise(arguments) if flag in flags}) - {""}


def hidden(text: str, keys: Collection[str]) -> str:
    """A text for people, with `…` in place of the keys."""
    for key in keys:
        text = text.replace(key, "…")
    return text


def _sendable(text: str) -> str:
    """An argument's type: what can stand in a header. Its message must not repeat the text."""
    key = text.strip()
    if not key or not (key.isascii() and key.isprintable()) or " " in key:
        raise argparse.ArgumentTypeError("a key must be one word of printable ASCII characters (it is not shown here)")
    return key
