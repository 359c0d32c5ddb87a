"""A small model on this machine's CPU, dense and then with LessIsMore decode, on the same problems.

`python -m sgl_lim.programs.demo`, from a checkout of the repository; `launch/demo.sh` sets the environment up first.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_lim import command
from sgl_lim.checkpoints import CheckpointError, ensure
from sgl_lim.programs import compare
from sgl_lim.programs.server_process import (
    Launch,
    ServerFailed,
    ServerProcess,
    end_tree,
    launch_command,
    running_servers,
)

MODEL = Path("models/chain-tracer")
PUBLIC = "smollm2"
"""A checkpoint that others trained; it is downloaded once."""
FACTS, SENTENCES = 330, 130
STEPS, SAMPLES = 24, 2
LINE_EVERY_S = 10.0
_START_TIMEOUT_S = 300
_SERVER = ("--device", "cpu", "--max-running-requests", "16", "--sleep-on-idle")
_SPEED = re.compile(r"Decode batch.*#running-req: (\d+).*gen throughput \(token/s\): ([\d.]+)")
# The CPU everywhere, so that figures mean the same everywhere; nothing is looked up on a hub.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Task:
    """What is asked of which model."""

    model: Path
    what: str
    pool: int
    """Tokens of the servers' KV pools."""
    flags: tuple[str, ...]
    """Of `sgl_lim.programs`."""


class DemoFailed(RuntimeError):
    """The program that asks a server failed; the message carries what it printed."""


def main(argv: Sequence[str]) -> int:
    """Run. The exit code is 0, 1 if something failed, or 130 after Ctrl-C."""
    args = _parse(argv)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="sgl-lim-demo."))
    try:
        _say(f"looking for the model {args.model}")
        task = _needles(args) if args.model == PUBLIC else _chains(args)
        _say(f"{args.problems} problems: {task.what} (logs in {folder})")
        with _servers(task, args.budget, folder) as servers:
            for server in servers:
                _ask(server, task, folder)
    except (ServerFailed, DemoFailed, CheckpointError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    compare.main([f"{server.launch.name}={folder / server.launch.name}.json" for server in servers])
    _say(f"took {time.monotonic() - began:.0f} s")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sgl_lim.programs.demo", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        choices=(MODEL.name, PUBLIC),
        default=MODEL.name,
        help="%(default)s reasons in chains; smollm2 is a public chat model and finds codes in prose",
    )
    add("--budget", type=_at_least(1), default=256, help="tokens that a sparse layer reads (default: %(default)s)")
    add("--problems", type=_at_least(1), default=4, help="default: %(default)s")
    for name, least, default, what in (
        ("samples", 2, SAMPLES, "answers to each problem"),
        ("steps", 1, STEPS, "links of a chain, 8 tokens each"),
    ):
        add(f"--{name}", type=_at_least(least), help=f"{what} (default: {default}; only of {MODEL.name})")
    args = parser.parse_args(argv)
    for name in ("samples", "steps"):
        if args.model == PUBLIC and getattr(args, name) is not None:
            parser.error(f"argument --{name}: only with --model {MODEL.name}")
    if args.model == MODEL.name and not MODEL.is_dir():
        parser.error(f"there is no {MODEL} in {Path.cwd()}; run this from a checkout of the repository")
    return args


def _chains(args: argparse.Namespace) -> Task:
    steps, samples = args.steps or STEPS, args.samples or SAMPLES
    what = f"{FACTS} facts in the context, {steps} links to follow, {samples} answers each"
    flags = ("--program", "self-consistency", "--samples", samples, "--chains", args.problems)
    return Task(MODEL, what, 60_000, (*map(str, flags), "--facts", str(FACTS), "--steps", str(steps)))


def _needles(args: argparse.Namespace) -> Task:
    what = f"a code hidden in {SENTENCES} sentences, greedy"
    flags = ("--needles", args.problems, "--sentences", SENTENCES, "--chat-template", "chatml")
    return Task(ensure(PUBLIC), what, 16_384, tuple(map(str, flags)))


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} on, got {text}")
        return int(text)

    return number


@contextlib.contextmanager
def _servers(task: Task, budget: int, folder: Path) -> Iterator[list[ServerProcess]]:
    """A dense server and one with LessIsMore. Both start at once; the one that is not asked sleeps."""
    flags = {
        "dense": ("--attention-backend", "torch_native"),
        "lessismore": ("--attention-backend", "lessismore", "--lim-budget", str(budget)),
    }
    launches = [
        Launch(
            ("--model-path", str(task.model), "--max-total-tokens", str(task.pool), *_SERVER, *own),
            log=folder / f"{name}.log",
            name=name,
            environment={**os.environ, **_ENVIRONMENT},
        )
        for name, own in flags.items()
    ]
    for launch in launches:
        _say(f"{launch.name}: {launch_command(launch.arguments)}")
    with contextlib.ExitStack() as stack:
        with _lines("both servers are starting"):
            servers = stack.enter_context(running_servers(launches, timeout=_START_TIMEOUT_S, grace=0))
        yield servers


def _ask(server: ServerProcess, task: Task, folder: Path) -> None:
    """Put the problems to a server; their summary goes to a file with its name."""
    name = server.launch.name
    command = [sys.executable, "-m", "sgl_lim.programs", "--endpoint", server.url, *task.flags]
    command += ["--output", f"{folder / name}.jsonl", "--summary", f"{folder / name}.json"]
    with (folder / f"{name}.txt").open("w+") as printed, _lines(name, lambda: _speed(server)):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=server.launch.environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            # At Ctrl-C, `subprocess.run` waits a quarter of a second for a process that it killed, and goes on.
            end_tree(process)
        printed.seek(0)
        if code:
            raise DemoFailed(f"{name}: the problems could not be solved ({code})\n{printed.read()}")


def _speed(server: ServerProcess) -> str:
    """What the server last logged of its decode steps."""
    found = _SPEED.findall(server.log())
    return f"({found[-1][0]} answers at {found[-1][1]} tokens/s)" if found else "(no token yet)"


@contextlib.contextmanager
def _lines(what: str, state: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say at once what goes on, and every `LINE_EVERY_S` seconds for how long it has, and its state."""
    done, began = threading.Event(), time.monotonic()

    def work() -> None:
        while not done.wait(LINE_EVERY_S):
            _say(f"{what}: {time.monotonic() - began:.0f} s {state()}".rstrip())

    _say(what)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
