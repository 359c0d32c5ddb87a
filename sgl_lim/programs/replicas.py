"""Servers of one model behind SGLang's router, until Ctrl-C: requests with a common prefix meet on one server.

    python -m sgl_lim.programs.replicas --replicas 2 -- --model-path models/chain-tracer --device cpu \\
        --attention-backend lessismore

What follows `--` are the arguments of every server. The router is SGLang's own (`sglang-router` on PyPI).
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from sgl_lim import command
from sgl_lim.programs import api_key, proxies
from sgl_lim.programs.argument_types import integer
from sgl_lim.programs.server_process import (
    Launch,
    ServerFailed,
    claim_port,
    end_tree,
    launch_command,
    running_servers,
)

ROUTER = ("-m", "sglang_router.launch_router")  # arguments of a Python
POLICIES = ("cache_aware", "round_robin", "random", "power_of_two")
_POLL_S = 0.25
_TAIL_LINES = 30


@dataclass(frozen=True)
class RouterLaunch:
    """What a router is started with."""

    workers: Sequence[str]
    """URLs of the servers."""
    policy: str
    log: Path
    """Its standard output and error; overwritten."""
    port: int
    more: Sequence[str] = ()
    """Further arguments of the router."""
    environment: Mapping[str, str] | None = None
    """All variables; None: those of this process."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def arguments(self) -> list[str]:
        """Behind those that start Python."""
        # Its metrics have a port of their own, which two routers of one machine would share by default.
        ports = ["--host", "127.0.0.1", "--port", str(self.port), "--prometheus-port", str(claim_port())]
        return [*ROUTER, "--worker-urls", *self.workers, "--policy", self.policy, *ports, *self.more]


def installed() -> bool:
    """Whether this Python has the router."""
    return importlib.util.find_spec("sglang_router") is not None


@contextlib.contextmanager
def running_router(launch: RouterLaunch, *, timeout: float = 60.0) -> Iterator[str]:
    """A router that knows all of its servers; its URL. The servers are there already.

    Raises:
        ServerFailed: the router is not installed, ended, or did not find its servers in time.
    """
    if not installed():
        raise ServerFailed(f"sglang-router is not installed; run {command.how_to_install('sglang_router')}")
    environment = os.environ if launch.environment is None else launch.environment
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    with launch.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *launch.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **proxies.direct_loopback(environment)},
            start_new_session=True,
        )
    try:
        _wait_for_workers(process, launch, timeout)
        yield launch.url
    finally:
        end_tree(process)


def _wait_for_workers(process: "subprocess.Popen[Any]", launch: RouterLaunch, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        if healthy_workers(launch.url) == len(launch.workers):
            return
        time.sleep(_POLL_S)
    what = "is not ready" if process.poll() is None else f"ended with {process.poll()}"
    tail = launch.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    raise ServerFailed("\n".join([f"the router {what}; its log is {launch.log}, the end of it:", *tail]))


def healthy_workers(url: str) -> int:
    """Servers that a router sends requests to; 0 as long as it does not answer."""
    proxies.keep_direct(url)
    try:
        answer = requests.get(f"{url}/workers", headers=api_key.headers(None), timeout=5)
        return sum(worker["is_healthy"] for worker in answer.json()["workers"]) if answer.ok else 0
    except (requests.RequestException, ValueError):
        return 0


def replica_launches(
    arguments: Sequence[str],
    replicas: int,
    logs: Path,
    *,
    gpus_each: int = 0,
    environment: Mapping[str, str] | None = None,
) -> list[Launch]:
    """How the servers are started: alike, but for their GPUs and their logs.

    Args:
        gpus_each: GPUs of a server, counted from the machine's first; 0 leaves the choice to the arguments.
    """
    launches = []
    for number in range(replicas):
        gpus = ["--base-gpu-id", str(number * gpus_each)] if gpus_each else []
        name = f"replica-{number}"
        launches.append(Launch((*arguments, *gpus), log=logs / f"{name}.log", name=name, environment=environment))
    return launches


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C. The exit code is 1 if a server or the router failed, 130 after Ctrl-C."""
    args = _parse(argv)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="replicas-"))
    launches = replica_launches(args.arguments, args.replicas, logs, gpus_each=args.gpus_each)
    for launch in launches:
        _say(f"{launch.name}: {launch_command(launch.arguments)}")
    try:
        with running_servers(launches, timeout=args.start_timeout) as servers:
            urls = [server.url for server in servers]
            router = RouterLaunch(urls, args.policy, logs / "router.log", args.port, shlex.split(args.router))
            with running_router(router) as url:
                _say(f"{url} is the router ({args.policy}) of {', '.join(urls)}; logs in {logs}; Ctrl-C ends all")
                while not threading.Event().wait(1):
                    for server in servers:
                        server.check_alive()
    except ServerFailed as error:
        _say(f"error: {error}")
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.programs.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--replicas", type=integer(1), default=2, metavar="N", help="servers (default: %(default)s)")
    add("--policy", choices=POLICIES, default=POLICIES[0], help="which server gets a request (default: %(default)s)")
    add("--port", type=integer(1, 65535), default=30000, help="the router's (default: %(default)s)")
    add("--gpus-each", type=integer(0), default=0, metavar="N", help="GPUs of each server: its --tp-size; 0 on a CPU")
    add("--router", default="", metavar="ARGUMENTS", help="further arguments of the router")
    add("--logs", type=Path, metavar="FOLDER", help="where logs go (default: a new temporary folder)")
    add("--start-timeout", type=float, default=900, metavar="S", help="for the servers (default: %(default)s)")
    add("arguments", nargs="+", help="of every server, behind `--`")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
