"""A SGLang server that a benchmark starts: ports of its own, a log, and no process left behind."""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

LAUNCHER = (sys.executable, "-m", "sglang.launch_server")


class ServerFailed(RuntimeError):
    """A server did not start; the message carries the end of its log."""


def launch_command(arguments: Sequence[str]) -> str:
    """How a person starts the same server."""
    return shlex.join(["python", "-m", "sglang.launch_server", *arguments])


@contextlib.contextmanager
def own_server(arguments: Sequence[str], log: Path, *, timeout: float) -> Iterator[str]:
    """The URL of a server that has answered `/health_generate`. It and all its processes end with the context.

    `timeout` in seconds.

    Raises:
        ServerFailed: it ended, or did not answer in time.
    """
    port, nccl_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    ports = ["--host", "127.0.0.1", "--port", str(port), "--nccl-port", str(nccl_port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*LAUNCHER, *arguments, *ports],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not _healthy(url):
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with {process.returncode} while starting\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server does not answer after {timeout:.0f} s\n{_tail(log)}")
            time.sleep(0.5)
        yield url
    finally:
        _end(process)


def free_port() -> int:
    """A port that nothing listens on.

    It lies below the range from which systems number outgoing connections: a server binds some of its ports only
    seconds after it was given them.
    """
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _healthy(url: str) -> bool:
    try:
        # `/health_generate` waits for a token itself.
        with urllib.request.urlopen(f"{url}/health_generate", timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes], grace: float = 20.0) -> None:
    """SIGTERM to the launcher, SIGKILL to what is left of its group when it is gone, or after `grace` seconds.

    The launcher takes a SIGTERM to its workers for their crash, and would look into it.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    # The next server sizes its pool by the memory that is free then, so wait until the group is gone.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def _tail(log: Path, lines: int = 40) -> str:
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"its log is {log}; the end of it:", *tail])
