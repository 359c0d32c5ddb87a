"""Where this package keeps what it made, in the user's cache."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of ours below `XDG_CACHE_HOME`, or `~/.cache`; it need not exist.

    Raises:
        RuntimeError: the user has no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sgl-lim" / name
