"""Python in a process of its own that compiles kernels, where this one may interpret them."""

import os
import subprocess
import sys
from pathlib import Path


def printed_by(*arguments: str | Path, cache: Path | None = None) -> list[str]:
    """The lines that Python prints with these arguments, with our `sys.path` and no variable of Triton's.

    Args:
        cache: where Triton keeps what it compiles; None: where it always does.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if cache is not None:
        variables["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
