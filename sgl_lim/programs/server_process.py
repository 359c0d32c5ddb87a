"""A SGLang server as a child of this process: ports that nobody else has, a log, and nothing left behind.

The demo, the benchmarks and the tests start their servers here. Linux only, like the servers.
"""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import requests

from sgl_lim.programs import api_key, proxies

LAUNCHER = ("-m", "sglang.launch_server")  # arguments of a Python

# Below the range from which systems number outgoing connections: a server binds some ports seconds after it got them.
_PORTS = range(12000, 32000)
_TRIES = 1000
_POLL_S = 0.25
_HEALTH_TIMEOUT_S = 60.0  # the server's own answer may take a generation
_END_TIMEOUT_S = 30.0
_TAIL_LINES = 60

# One for each port that was handed out; see `claim_port`.
_claims: list[socket.socket] = []


class ServerFailed(RuntimeError):
    """A server did not start, ended, or does not go away; the message carries the end of its log."""


@dataclass(frozen=True)
class Launch:
    """What a server is started with."""

    arguments: Sequence[str]
    """Of the launcher, without host and ports."""
    log: Path
    """Its standard output and error; overwritten."""
    name: str = "the server"
    """For messages."""
    python: str = sys.executable
    environment: Mapping[str, str] | None = None
    """All variables; None: those of this process."""
    folder: Path | None = None
    """Working directory; None: that of this process."""


def launch_command(arguments: Sequence[str]) -> str:
    """How a person starts the same server, who knows its keys."""
    keys = api_key.keys_in(arguments)
    return shlex.join(["python", *LAUNCHER, *(api_key.hidden(argument, keys) for argument in arguments)])


@contextlib.contextmanager
def running_server(launch: Launch, *, timeout: float, grace: float = 20.0) -> Iterator["ServerProcess"]:
    """One server; see `running_servers`."""
    with running_servers([launch], timeout=timeout, grace=grace) as servers:
        yield servers[0]


@contextlib.contextmanager
def running_servers(
    launches: Sequence[Launch], *, timeout: float, grace: float = 20.0
) -> Iterator[list["ServerProcess"]]:
    """Servers that start at the same time and have generated a token. All their processes end with the context.

    SIGTERM and SIGHUP leave the context like Ctrl-C does, unless the program handles them itself.

    Args:
        timeout: seconds until all have to be ready.
        grace: seconds that each gets to end by itself.

    Raises:
        ServerFailed: one ended, or was not ready in time.
    """
    servers = [ServerProcess(launch) for launch in launches]
    with exit_on_termination(), contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop, grace)
            server.start()
        deadline = time.monotonic() + timeout
        for server in servers:
            server.wait_ready(max(0.0, deadline - time.monotonic()))
        yield servers


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise SystemExit, so that contexts end as they do at Ctrl-C.

    A signal that the program handles already, or ignores, keeps its handler. Does nothing outside the main thread,
    where Python sets no handlers.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class ServerProcess:
    """One launcher in a process group of its own. Whoever calls `start` has to call `stop`."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.port = claim_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the launcher; returns at once."""
        launch = self.launch
        ports = ["--host", "127.0.0.1", "--port", str(self.port), "--nccl-port", str(claim_port())]
        environment = os.environ if launch.environment is None else launch.environment
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("wb") as log:
            self._process = subprocess.Popen(
                [launch.python, *LAUNCHER, *launch.arguments, *ports],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=launch.folder,
                # SGLang asks its own server for a first token, and would do so through a proxy.
                env={**environment, **proxies.direct_loopback(environment)},
                start_new_session=True,
            )

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server has generated a token, `timeout` seconds at most.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.check_alive()
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServerFailed(f"{self.launch.name} was not ready after {timeout:.0f} s\n{self.log_tail()}")
            if _is_healthy(self.url, min(left, _HEALTH_TIMEOUT_S)):
                return
            time.sleep(_POLL_S)

    @property
    def alive(self) -> bool:
        """Whether the launcher runs."""
        return self._process is not None and self._process.poll() is None

    def check_alive(self) -> None:
        """Raise `ServerFailed` if the launcher does not run."""
        if self._process is None:
            raise ServerFailed(f"{self.launch.name} does not run: not started, or stopped before")
        if self._process.poll() is not None:
            raise ServerFailed(f"{self.launch.name} ended with {self._process.returncode}\n{self.log_tail()}")

    def stop(self, grace: float = 0.0) -> None:
        """End the launcher and all that it started; see `end_tree`. Does nothing if it was not started."""
        process, self._process = self._process, None
        if process is not None:
            end_tree(process, grace)

    def log(self) -> str:
        """Everything the server printed so far, but for its keys: SGLang prints all of its arguments."""
        text = self.launch.log.read_text(errors="replace") if self.launch.log.exists() else ""
        return api_key.hidden(text, api_key.keys_in(self.launch.arguments))

    def log_tail(self) -> str:
        """Where the log is, and its end."""
        return "\n".join([f"its log is {self.launch.log}; the end of it:", *self.log().splitlines()[-_TAIL_LINES:]])


def claim_port() -> int:
    """A port that nothing listens on, different at every call, also of other processes that call this.

    Each port is claimed by a name that the system frees when this process ends.

    Raises:
        ServerFailed: none was found.
    """
    for port in random.sample(_PORTS, _TRIES):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sgl-lim-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port
    raise ServerFailed(f"no free port among {_TRIES} of {_PORTS.start} to {_PORTS.stop - 1}; end servers that are left")


def end_tree(process: subprocess.Popen[Any], grace: float = 0.0) -> None:
    """End a process that leads a group, its descendants and its group, and wait until they are gone.

    With `grace` it gets SIGTERM first, and that many seconds. It alone: SGLang's launcher takes a SIGTERM to its
    workers for their crash, and would look into it. What is left is killed.

    Raises:
        ServerFailed: some process is still there after SIGKILL.
    """
    family = _family(process.pid)
    try:
        if grace:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        family |= _family(process.pid)
        if process.poll() is None:
            process.kill()
        process.wait()
        _kill(family, process.pid)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _family(pid: int) -> set[psutil.Process]:
    """Descendants of a process, and members of its group that lost their parents; without itself."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        found.update(psutil.Process(pid).children(recursive=True))
    for other in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if other != pid and os.getpgid(other) == pid:
                found.add(psutil.Process(other))
    return found


def _kill(family: set[psutil.Process], group: int) -> None:
    deadline = time.monotonic() + _END_TIMEOUT_S
    # Members may start others until they are gone.
    while left := {member for member in family | _family(group) if is_running(member)}:
        if time.monotonic() > deadline:
            pids = ", ".join(str(member.pid) for member in left)
            raise ServerFailed(f"processes {pids} of a server are still there {_END_TIMEOUT_S:.0f} s after SIGKILL")
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(0.02)


def is_running(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    try:
        # Orphans stay zombies where the first process of a container reaps none.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_healthy(url: str, timeout: float) -> bool:
    proxies.keep_direct(url)
    try:
        # The server generates a token before it answers. It asks for no key here.
        return requests.get(f"{url}/health_generate", timeout=timeout).status_code == 200
    except requests.RequestException:
        return False
