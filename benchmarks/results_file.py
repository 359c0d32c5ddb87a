"""CSV files of results, which grow by rows."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, with a header if the file is new; its folder is made where it is missing.

    Raises:
        SystemExit: the file has other columns.
    """
    require_columns(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Exit if a CSV file has other columns; a benchmark asks before it measures for long."""
    if path.exists() and path.read_text().split("\n", 1)[0].strip() != ",".join(columns):
        raise SystemExit(f"error: {path} has other columns than {','.join(columns)}; give another --output")
