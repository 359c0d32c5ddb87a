"""Waiting for what other processes do. No test asserts a time: a wait that has no end fails by what it waited for."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 240.0
"""Far more than anything takes here, on a busy machine too."""


def wait_until(condition: Callable[[], bool], what: str, *, beside: "subprocess.Popen[Any] | None" = None) -> None:
    """Return as soon as `condition` holds.

    Args:
        what: what is waited for, for the failure's message.
        beside: a process that must go on running in the meantime.

    Raises:
        RuntimeError: that process ended.
        TimeoutError: the condition does not come true.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if beside is not None and beside.poll() is not None:
            raise RuntimeError(f"the process ended with {beside.returncode} before this came true: {what}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.02)


def has_lines(path: Path, count: int) -> bool:
    """Whether a file that another process writes has as many whole lines."""
    return path.exists() and path.read_bytes().count(b"\n") >= count
