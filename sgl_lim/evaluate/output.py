"""Whether a file can be written, asked before the work whose result it will have."""

import os
from pathlib import Path


def check_output(path: Path) -> None:
    """Make the folder of `--output`. Raises ValueError if the file could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--output {path}: cannot be written")
