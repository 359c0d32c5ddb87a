"""Where this package keeps what it made, in the user's cache."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of ours below `XDG_CACHE_HOME`, or `~/.cache`; it need not exist.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"there is no folder for a cache ({error}); set XDG_CACHE_HOME") from error
    return Path(cache) / "sgl-lim" / name
