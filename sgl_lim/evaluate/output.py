"""Where results go: files that are checked before the work, CSV files that grow, and aligned tables."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


class RowsFile:
    """A CSV file that grows by rows; each is on disk when `add` returns."""

    def __init__(self, path: Path, names: Sequence[str], where: Mapping[str, str]) -> None:
        """Begin anew, with the columns `names`, and those of `where` equal in every row."""
        self._path, self._names, self._where = path, names, dict(where)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, self._names, lineterminator="\n").writeheader()

    def add(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Append rows, by column."""
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._names, lineterminator="\n")
            writer.writerows({**row, **self._where} for row in rows)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells as a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def check_output(path: Path) -> None:
    """Make the folder of `--output`. Raises ValueError if the file could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--output {path}: cannot be written")
