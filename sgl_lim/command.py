"""How a command begins and ends: something to read at once, Ctrl-C without a traceback, and what to install."""

import importlib.metadata
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
REQUIREMENTS = {
    "gguf": "gguf>=0.19,<1",
    "math_verify": "math-verify>=0.9,<1",
    "matplotlib": "matplotlib>=3.8,<4",
    "sglang_router": "sglang-router>=0.3.2,<0.4",
}
"""What is optional, by the name that is imported, as the extras of pyproject.toml have it."""


def about_to_run(package: str) -> str | None:
    """The module of `package` that `python -m` is about to run; None once it runs, and in every other process.

    Python imports a module's packages before the module, and until then `sys.argv` begins with `-m`.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv[:-1]:
        return None
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return module if module == package or module.startswith(f"{package}.") else None


def announce(module: str) -> None:
    """Say that a command has begun whose imports take seconds."""
    print(f"{module}: loading PyTorch and what else it needs", file=sys.stderr, flush=True)


def leave_at_interrupt() -> None:
    """Let Ctrl-C end this process at once, as long as it only imports; `run` takes this back.

    An exception would not do: some imports catch what is raised, and others print it and go on.
    """
    # Whoever started this process may have it ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def importing() -> Iterator[None]:
    """A context of imports that take seconds, in which Ctrl-C ends this process at once, whatever else handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end this process with its exit code: 0 for None, 130 after Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def how_to_install(module: str) -> str:
    """The command that brings an optional module of `REQUIREMENTS` into this Python's environment."""
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install" if _has_pip() else f"uv pip install --python {python}"
    return f"{pip} {shlex.quote(REQUIREMENTS[module])}"


def _has_pip() -> bool:
    """Whether there is a pip: an environment that uv made has none.

    Looking for the module would not do. setuptools takes that for the start of pip, and cannot be imported afterwards.
    """
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
