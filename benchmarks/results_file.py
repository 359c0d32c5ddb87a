"""CSV files of results, which grow by rows, and the rows as a table."""

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
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Exit if a CSV file has other columns; a benchmark asks before it measures for long."""
    if path.exists() and path.read_text().split("\n", 1)[0].strip() != ",".join(columns):
        raise SystemExit(f"error: {path} has other columns than {','.join(columns)}; give another --output")


def rounded(value: float | None, digits: int) -> float | str:
    """A table's cell; blank where there is no value."""
    return "" if value is None else round(value, digits)


def ratio(value: float | None, baseline: float | None) -> float | str:
    """`value` of `baseline`; blank where one is missing."""
    return round(value / baseline, 2) if value is not None and baseline else ""


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table of rows with `machine`, `server` and `command`; what does not fit into one stands below it."""
    shown = [name for name in columns if name not in ("machine", "command")]
    lines = [shown, ["---"] * len(shown), *([str(row[name]) for name in shown] for row in rows)]
    commands = dict.fromkeys(f"{row['server']}: `{row['command']}`" for row in rows if row["command"])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", rows[0]["machine"], *commands])
