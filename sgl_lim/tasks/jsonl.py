"""Lines of JSON that people write."""

import json
from decimal import Decimal
from typing import Any, NoReturn


def decode(content: bytes) -> str:
    """A file's text, without the byte order mark that some editors begin it with. Raises UnicodeDecodeError."""
    return content.decode("utf-8-sig")


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object that a line is. Its floats are `Decimal`, which keeps them as they are written.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        row = json.loads(line, parse_float=Decimal, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise ValueError(f"JSON that Python does not read ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def type_name(value: Any) -> str:
    """Name of a value's type, for people."""
    return "float" if isinstance(value, Decimal) else type(value).__name__


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
