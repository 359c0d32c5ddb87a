"""Several running servers on the same items: `python -m sgl_lim.programs.compare_servers NAME=URL NAME=URL …`."""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_lim import command
from sgl_lim.programs import api_key, cli, run_flags, run_options
from sgl_lim.programs.argument_types import url
from sgl_lim.programs.cli import FAILED, OK, USAGE, Exit
from sgl_lim.programs.comparison_plot import PlotError, draw
from sgl_lim.programs.comparison_table import Result, comparison_rows, markdown, write_csv
from sgl_lim.programs.run_options import Options
from sgl_lim.programs.run_records import RecordError, RecordFile, describe_differences, read_rows
from sgl_lim.programs.stop_signals import SignalHandlers

_SERVER = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(https?://.+)")
_TABLES = "comparison"
_EPILOG = """
example:
  %(prog)s dense=http://127.0.0.1:30000 lim=http://127.0.0.1:30001 --problems aime2024 --samples 32 \\
      --chat-template chatml --output out/aime2024

The folder of --output gets NAME.jsonl and NAME.json of each server, and comparison.csv, .md and .png. Differences are
to the first server. Run the same command again to resume.
"""


@dataclass(frozen=True)
class _Server:
    name: str
    options: Options
    argv: list[str]  # of `python -m sgl_lim.programs`


@dataclass(frozen=True)
class _Comparison:
    servers: list[_Server]
    folder: Path
    at_once: bool
    machine: str
    resume_command: str


def main(argv: list[str]) -> int:
    """Run.

    Returns:
        The exit code: 0; 1 if a server's run failed, or if there is no plot beside the tables; 2 for arguments; 128
        plus the signal's number if stopped by SIGINT or SIGTERM.
    """
    comparison = _parse(argv)
    _say(f"looking at {len(comparison.servers)} servers and the problems")
    try:
        asked = _check(comparison.servers)
        _ask_all(comparison)
        _report(comparison, asked)
    except Exit as error:
        _say(f"error: {error}" if error.code in (FAILED, USAGE) else str(error))
        return error.code
    return OK


def _parse(argv: list[str]) -> _Comparison:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.programs.compare_servers",
        description="Run a reasoning program against several running servers on the same items, and compare them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("servers", nargs="+", type=_server, metavar="NAME=URL", help="two or more; names become files")
    run_flags.add_run_flags(parser)
    _add_own_flags(parser)
    args = parser.parse_args(argv)
    names = [name for name, _ in args.servers]
    if len(names) < 2:
        parser.error("argument NAME=URL: two servers or more; one alone is what python -m sgl_lim.programs is for")
    for name in names:
        if names.count(name) > 1 or name == _TABLES:
            parser.error(f"argument NAME=URL: {name} is taken; every server needs a name of its own")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_own_flags(own)
    shared = own.parse_known_args([text for text in argv if not _SERVER.fullmatch(text)])[1]
    return _Comparison(
        servers=[_one(parser, args, name, url, shared) for name, url in args.servers],
        folder=args.output,
        at_once=args.at_once,
        machine=args.machine,
        resume_command=api_key.command("sgl_lim.programs.compare_servers", argv),
    )


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to write, or to resume")
    add("--at-once", action="store_true", help="ask all servers at the same time (default: one after the other)")
    api_key.add_flag(parser)
    add("--machine", default="", metavar="TEXT", help="what the servers run on, for the tables and the plot")


def _server(text: str) -> tuple[str, str]:
    matched = _SERVER.fullmatch(text)
    if matched is None:
        raise argparse.ArgumentTypeError(f"must be NAME=http://… of letters, digits, '.', '_' and '-', got {text!r}")
    return matched[1], url(matched[2])


def _one(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, url: str, shared: list[str]) -> _Server:
    output, summary = args.output / f"{name}.jsonl", args.output / f"{name}.json"
    paths = ["--endpoint", url, "--output", str(output), "--summary", str(summary)]
    return _Server(name, run_options.checked(parser, args, url, output, summary), [*paths, *shared])


def _check(servers: Sequence[_Server]) -> set[str]:
    """Find everything that can be wrong on any server before the first one is asked.

    Returns:
        The ids of the problems.

    Raises:
        Exit: something is, or the servers would not be asked the same.
    """
    prepared, asked = [], set[str]()
    for server in servers:
        try:
            run = cli.prepare(server.options, server.argv)
            RecordFile(server.options.output, run.settings).close()
        except Exit as error:
            raise Exit(error.code, f"{server.name}: {error}") from error
        except RecordError as error:
            raise Exit(USAGE, f"{server.name}: --output: {error}") from error
        asked = {problem.id for problem in run.problems}
        prepared.append({name: value for name, value in run.settings.items() if name not in ("attention", "model")})
    for server, settings in zip(servers, prepared, strict=True):
        if differences := describe_differences(prepared[0], settings):
            listed = (
                "; ".join(differences).replace("file has", f"{servers[0].name} has").replace("this run", server.name)
            )
            raise Exit(
                USAGE, f"the servers would not be asked the same: {listed}; name it with its flag (--max-tokens)"
            )
    return asked


def _ask_all(comparison: _Comparison) -> None:
    """Run the program against each server, in processes of their own: each handles signals itself.

    Raises:
        Exit: a run failed or was stopped.
    """
    groups = [comparison.servers] if comparison.at_once else [[server] for server in comparison.servers]
    with ExitStack() as stack, _Children() as children:
        for group in groups:
            for server in group:
                children.start(server, stack)
            codes = {server.name: children.wait(server) for server in group}
            if children.signal_number:
                raise Exit(128 + children.signal_number, f"interrupted; to go on: {comparison.resume_command}")
            if failed := [name for name, code in codes.items() if code]:
                raise Exit(FAILED, f"no comparison: {', '.join(failed)} failed; to go on: {comparison.resume_command}")


class _Children(SignalHandlers):
    """Runs of `python -m sgl_lim.programs`; SIGINT and SIGTERM are handed to them, once each."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[str, tuple[subprocess.Popen[str], list[threading.Thread]]] = {}

    def start(self, server: _Server, stack: ExitStack) -> None:
        """Start a server's run; its lines get its name in front."""
        command = [sys.executable, "-m", "sgl_lim.programs", *server.argv]
        key = server.options.api_key
        # Not on its command line, which every user of the machine can read.
        environment = {**os.environ, **({} if key is None else {api_key.VARIABLES[0]: key})}
        # A session of its own: a terminal's Ctrl-C is handed on by us, and would come twice otherwise.
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        process = stack.enter_context(subprocess.Popen(command, start_new_session=True, **pipes))
        stack.callback(process.kill)
        readers = [
            threading.Thread(target=_relay, args=(server.name, stream), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in readers:
            reader.start()
        self._running[server.name] = process, readers
        if self.signal_number:
            process.send_signal(self.signal_number)

    def wait(self, server: _Server) -> int:
        """Wait for a server's run; returns its exit code."""
        process, readers = self._running[server.name]
        code = process.wait()
        for reader in readers:
            reader.join()
        return code

    def handle(self, number: int) -> None:
        """Hand it on to the runs that have not ended."""
        for process, _ in self._running.values():
            if process.poll() is None:
                process.send_signal(number)


def _relay(name: str, stream: Any) -> None:
    for line in stream:
        _say(f"{name}: {line.rstrip()}")


def _report(comparison: _Comparison, asked: set[str]) -> None:
    results = []
    for server in comparison.servers:
        assert server.options.summary is not None
        summary = json.loads(server.options.summary.read_text())
        last = {row.id: row for row in read_rows(server.options.output) if row.id in asked}
        results.append(Result(server.name, summary, last))
    rows = comparison_rows(results, comparison.machine)
    base = comparison.folder / _TABLES
    text = markdown(results, rows) + f"- `{comparison.resume_command}`\n"
    write_csv(base.with_suffix(".csv"), rows)
    base.with_suffix(".md").write_text(text)
    print(text, end="", flush=True)
    try:
        draw(rows, base.with_suffix(".png"))
    except PlotError as error:
        raise Exit(FAILED, f"{error} (the tables are in {comparison.folder})") from error
    _say(f"written: {base}.csv, .md and .png")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
