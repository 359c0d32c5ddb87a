"""Lines of JSON that people write."""

import json
from typing import Any


def decode(content: bytes) -> str:
    """A file's text, without the byte order mark that some editors begin it with. Raises UnicodeDecodeError."""
    return content.decode("utf-8-sig")


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object that a line is.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise ValueError(f"JSON that Python does not read ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row
