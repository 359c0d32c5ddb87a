"""Servers that a benchmark measures one after the other: running endpoints, or servers started for it."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.programs import api_key
from sgl_lim.programs.endpoint import EndpointError, asked
from sgl_lim.programs.server_process import Launch, launch_command, running_server
from sgl_lim.settings.kept_calibration import FOLDER_ENV


@dataclass(frozen=True)
class Target:
    """One server to measure: an endpoint that runs, or the arguments that start one."""

    name: str
    url: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """How a person starts the server; blank for one that runs already."""
        return "" if self.url else launch_command(self.arguments)


@contextmanager
def endpoint(target: Target, logs: Path, timeout: float) -> Iterator[str]:
    """The target's URL; a server of its own runs as long as the context.

    Unless the environment says where to look, no calibration kept on this machine decides its layers, so that its
    command gives the same elsewhere.
    """
    if target.url:
        yield target.url
    else:
        log = logs / f"{target.name}.log"
        print(f"starting {target.name}, log {log}", file=sys.stderr)
        environment = {FOLDER_ENV: str(logs / "calibrations"), **os.environ}
        with running_server(Launch(target.arguments, log, environment=environment), timeout=timeout) as server:
            yield server.url


def flush_cache(url: str) -> None:
    """Empty the radix cache, so that no prompt is found there.

    Raises:
        EndpointError: the server did not, for instance because other clients' requests run.
    """
    try:
        with asked(f"{url}/flush_cache?timeout=60", method="POST", timeout=90):
            pass
    except EndpointError as error:
        raise EndpointError(f"{error}; do other clients use the server?") from error


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """Add the endpoints, or the flags of servers to start."""
    parser.add_argument("endpoints", nargs="*", metavar="NAME=URL", help="running servers; the first is the baseline")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=ARGUMENTS", help="a server to start")
    parser.add_argument("--common", default="", metavar="ARGUMENTS", help="launch arguments of all servers to start")
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs (default: a new temporary one)")
    api_key.add_flag(parser)
    parser.add_argument("--start-timeout", type=float, default=900, metavar="S")


def chosen_targets(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, more: Sequence[str] = ()
) -> list[Target]:
    """The servers of a parsed command line; a parser error where it names none, or both ways, or one twice.

    Args:
        parser, args: with the flags of `add_target_flags`.
        more: launch arguments behind `--common`, for all servers to start.

    The key of `--api-key` goes into this process's environment, where every client finds it.
    """
    if args.api_key is not None:
        os.environ[api_key.VARIABLES[0]] = args.api_key
    if bool(args.endpoints) == bool(args.server):
        parser.error("give running servers as NAME=URL, or servers to start with --server; one of the two")
    named = [entry.partition("=") for entry in args.endpoints or args.server]
    names = [name for name, _, _ in named]
    if not all(name and value for name, _, value in named) or len(set(names)) < len(names):
        parser.error(f"expected NAME=… with a name of its own for each server, got {', '.join(names)}")
    if args.endpoints:
        return [Target(name, url=url.rstrip("/")) for name, _, url in named]
    common = [*shlex.split(args.common), *more]
    return [Target(name, arguments=(*common, *shlex.split(own))) for name, _, own in named]


def log_folder(args: argparse.Namespace) -> Path:
    """Where the servers' logs go."""
    return args.logs or Path(tempfile.mkdtemp(prefix="servers-"))
