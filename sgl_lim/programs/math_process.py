"""Ask `math_worker`, which reads and compares mathematical answers in a process of its own, within limits."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_START_SECONDS = 120.0  # for its imports, on a machine that is busy
_HUNG_SECONDS = 60.0  # a request without a reply waits for something, or the whole machine stands still
_GRACE_SECONDS = 0.5  # for all that is still to compare when the run is stopped
_POLL_SECONDS = 0.05


class WorkerLost(RuntimeError):
    """The worker does not start; the message says why."""


class GradingStopped(RuntimeError):
    """The run was stopped while answers were compared."""


class MathProcess:
    """The worker, started at once and waited for at the first request. Ends with its owner, or with the interpreter.

    Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._stop_at: float | None = None  # on the clock
        self._launch()

    def _launch(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sgl_lim.programs.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run, which decides what becomes of the worker
        )
        self._errors: list[bytes] = []
        drain = threading.Thread(target=_drain, args=(self._process.stderr, self._errors), daemon=True)
        drain.start()
        self._end = weakref.finalize(self, _end, self._process, drain)
        self._buffer = b""
        self._is_ready = False

    def close(self) -> None:
        """End the worker, whatever it does."""
        self._end()

    def start(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until it has imported what it needs; raises as `ask`."""
        if self._is_ready:
            return
        if self._line(_START_SECONDS, stopped) is None:
            raise WorkerLost(f"it did not start within {_START_SECONDS:.0f} s")
        self._is_ready = True

    def ask(self, request: dict[str, Any], seconds: float, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """The worker's reply, or None if it did not come to an end within `seconds` of processor time.

        Raises:
            WorkerLost: there is no worker.
            GradingStopped: `stopped()` became true some time ago.
        """
        self.start(stopped)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerLost(self._why()) from error
        reply = self._line(_HUNG_SECONDS, stopped)
        if reply is None:
            self.close()  # it waits for something, so that no limit of processor time ends it
            self._launch()
            return None
        if reply.get("ready"):  # of the next worker: the one that was asked is dead
            return None
        return reply

    def _check_stop(self, stopped: Callable[[], bool], now: float) -> None:
        if self._stop_at is None and stopped():
            self._stop_at = now + _GRACE_SECONDS
        if self._stop_at is not None and now > self._stop_at:
            self.close()
            raise GradingStopped("stopped while answers were compared")

    def _line(self, seconds: float, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """The next line of the worker; None after `seconds` on the clock."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            now = time.monotonic()
            self._check_stop(stopped, now)
            if now > deadline:
                return None
            if select.select([descriptor], [], [], _POLL_SECONDS)[0]:
                read = os.read(descriptor, 1 << 16)
                if not read:
                    raise WorkerLost(self._why())
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _why(self) -> str:
        self._process.wait()
        said = b"".join(self._errors).decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"it ended with code {self._process.returncode}"


def _drain(stream: Any, into: list[bytes]) -> None:
    """Keep what the worker says last, so that it never waits for a reader."""
    for line in stream:
        into.append(line)
        del into[:-20]


def _end(process: "subprocess.Popen[bytes]", drain: threading.Thread) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: the worker and who forks it
    process.wait()
    drain.join()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):  # what it was asked last may not fit into a pipe that nobody reads
                stream.close()
