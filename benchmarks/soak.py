"""A soak: a served model under a seeded mix of all that clients do, and afterwards two questions.

    python -m benchmarks.soak --method lessismore --method group --method quest --seconds 300
    python -m benchmarks.soak --method lessismore --model-path M --server-args '--device cuda --dtype bfloat16'
    python -m benchmarks.soak lessismore=http://127.0.0.1:30000

The mix: prompts short and long, shared prefixes, several answers a prompt, sessions, sampling, regular expressions and
schemas, one of which allows nothing, log-probabilities of chunked prompts, adapters with `--adapters`; read at once, as
streams, as streams that are left, or aborted; beside pauses, on a KV pool that is too small for all (soak_jobs.py).

Is anything in use when all is over? And is every finished greedy answer the answer alone? Each job is asked once more
on the idle server with an empty cache. Where two tokens are equally likely but for rounding, the answer may go on with
either: such ties are shown by the log-probabilities alone, and counted apart. So is what cannot be compared (`aside`):
what a request had generated before a retraction is prefilled again, and a prefill is dense, so that its keys are others
than those that sparse decode left. And a turn whose earlier turns were answered otherwise has another prompt.

The first Ctrl-C or SIGTERM ends the load early; what was answered by then is judged all the same.

Servers: `lessismore` reads a prefix for each request by itself, `group` once for all (`--lim-prefix-groups`); any other
name is that of a method. The exit status is 1 if an answer differs, something is left in use, or a request fails.
"""

import argparse
import itertools
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.load_spec import positive, seconds
from benchmarks.machine import machine_line_apart
from benchmarks.results_file import append_rows, markdown, require_columns
from benchmarks.soak_check import Comparison, compare, in_use, still_answers
from benchmarks.soak_client import Tally, alone, pause_now_and_then, send
from benchmarks.soak_jobs import Job, Sizes, make_jobs, order
from benchmarks.targets import Target, endpoint, flush_cache, log_folder
from sgl_lim import command
from sgl_lim.methods import METHODS
from sgl_lim.programs import api_key
from sgl_lim.programs.endpoint import EndpointError, server_info
from sgl_lim.programs.server_process import ServerFailed
from sgl_lim.programs.stop_signals import StopOnSignal

SERVERS = {name: f"--lim-method {name} --page-size {kind().page}" for name, kind in METHODS.items()}
SERVERS |= {"lessismore": "--lim-prefix-groups off", "group": "--lim-prefix-groups on"}
SMALL_POOL = "--max-total-tokens {pool} --max-running-requests 32 --schedule-conservativeness 0.3"
CHAIN_TRACER = Path(__file__).parents[1] / "models" / "chain-tracer"
TIES = {"float32": 1e-3}
OTHER_TIE = 0.25
"""A bfloat16 logit between 16 and 32 has steps of 0.125, and each of two tokens' may be a step off."""
COLUMNS = (
    *("server", "seconds", "clients", "jobs", "seed", "requests", "cuts", "aborts", "refused", "pauses", "compared"),
    *("ties", "differences", "aside", "failures", "tokens_in_use", "requests_in_use", "tie", "machine", "command"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak each server; the exit status is 1 if one is not sound."""
    args = parse_arguments(argv)
    if args.output:
        require_columns(args.output, COLUMNS)
    machine, logs, sound, rows = machine_line_apart(), log_folder(args), True, []
    for target in args.targets:
        try:
            with endpoint(target, logs, args.start_timeout) as url:
                cells, is_sound = soak(url, args)
        except (ServerFailed, EndpointError) as error:
            print(f"error: {target.name}: {error}", file=sys.stderr)
            sound = False
            continue
        sound &= is_sound
        named = {"server": target.name, "machine": machine, "command": target.command, **cells}
        rows.append({name: named[name] for name in COLUMNS})
        if args.output:
            append_rows(args.output, COLUMNS, rows[-1:])
    if rows:
        print(markdown(rows, COLUMNS))
    return int(not sound)


def soak(url: str, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Put the mix on one server, then ask both questions: the row's cells, and whether the server is sound.

    Raises:
        EndpointError: the server ended, or never becomes idle.
    """
    info = server_info(url)
    tie = args.tie or TIES.get(str(info.get("dtype")), OTHER_TIE)
    jobs = make_jobs(args.jobs, args.seed, Sizes(args.longest, args.output_len, args.token_range), args.adapters)
    tally = Tally()
    lasted = run_load(url, jobs, args, tally)
    tokens, requests = in_use(url)
    flush_cache(url)
    # A server without our backend decodes densely.
    budget = info["internal_states"][0].get("lessismore", {}).get("budget")
    comparison = compare(tally.answers, lambda job: ask_alone(url, job), tie=tie, dense_up_to=budget)
    tokens, requests = (max(pair) for pair in zip((tokens, requests), in_use(url), strict=True))
    if not still_answers(url):
        tally.failures.append("the server answers no more after it was idle")
    report(tally, comparison)
    cells = {name: getattr(args, name) for name in ("clients", "jobs", "seed")}
    cells["seconds"] = lasted
    cells |= {name: getattr(tally, name) for name in ("requests", "cuts", "aborts", "refused", "pauses")}
    cells |= {name: len(getattr(comparison, name)) for name in ("ties", "differences")}
    cells |= {"compared": comparison.compared, "aside": comparison.aside, "failures": len(tally.failures)}
    cells |= {"tokens_in_use": tokens, "requests_in_use": requests, "tie": tie}
    return cells, not (comparison.differences or tally.failures or tokens or requests)


def run_load(url: str, jobs: Sequence[Job], args: argparse.Namespace, tally: Tally) -> float:
    """Let clients send jobs for the time asked for, and wait until all have their answers: seconds that they sent.

    The first SIGINT or SIGTERM ends the load, and what was answered is judged.
    """
    began, ended = time.monotonic(), threading.Event()
    turns, lock = order(jobs, args.seed), threading.Lock()

    def client() -> None:
        while not ended.is_set():
            with lock:
                sent = next(turns)
            send(url, sent, tally)
            if len(tally.failures) > args.clients:
                return  # the server is gone, or nothing works

    with StopOnSignal() as stop, ThreadPoolExecutor(args.clients + 1) as pool:
        clients = [pool.submit(client) for _ in range(args.clients)]
        pauses = [] if args.no_pauses else [pool.submit(pause_now_and_then, url, args.seed, ended, tally)]
        while time.monotonic() < began + args.seconds and not all(one.done() for one in clients):
            if stop.event.is_set():
                break
            time.sleep(0.1)
        lasted = min(args.seconds, round(time.monotonic() - began, 1))
        if stop.signal_number:
            print(f"the load ended after {lasted} s; what was answered is judged", file=sys.stderr, flush=True)
        ended.set()
        for one in (*clients, *pauses):
            one.result()
    return lasted


def ask_alone(url: str, job: Job) -> list[Any]:
    """A job's answers, without anything in the cache."""
    flush_cache(url)
    return alone(url, job)


def report(tally: Tally, comparison: Comparison, most: int = 20) -> None:
    """Say what is wrong, and show ties; of differences, in which turns of which jobs all of them are."""
    turns = Counter((one.answer.job.kind, one.answer.job.number, one.answer.turn) for one in comparison.differences)
    for (kind, number, turn), times in turns.most_common():
        print(f"differs: {kind} {number}, turn {turn}: {times} times", file=sys.stderr)
    for name, found in (("failed", tally.failures), ("differs", comparison.differences), ("tie", comparison.ties)):
        for one in itertools.islice(found, most):
            print(f"{name}: {one}", file=sys.stderr)
        if len(found) > most:
            print(f"{name}: and {len(found) - most} more", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `targets` made of the servers it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoints", nargs="*", metavar="NAME=URL", help="servers that run, in place of --method")
    parser.add_argument("--method", action="append", choices=list(SERVERS), default=[], help="a server to start")
    parser.add_argument("--model-path", default=os.path.relpath(CHAIN_TRACER), metavar="M")
    parser.add_argument(
        "--server-args", default="--device cpu --dtype float32", metavar="ARGUMENTS", help="%(default)s"
    )
    parser.add_argument("--budget", type=positive, default=128, help="--lim-budget of servers to start")
    parser.add_argument("--pool", type=positive, default=4096, help="tokens in their KV pool")
    parser.add_argument("--seconds", type=seconds, default=300.0, help="of load on each server")
    parser.add_argument("--clients", type=positive, default=16)
    parser.add_argument("--jobs", type=positive, default=64, help="different ones; each is asked once more alone")
    parser.add_argument("--longest", type=positive, default=600, help="tokens of a prompt")
    parser.add_argument("--output-len", type=positive, default=64, help="tokens of an answer, at most")
    parser.add_argument("--token-range", type=int, nargs=2, default=(12, 512), metavar=("LO", "HI"), help="HI excluded")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="NAME", help="that the server has loaded")
    parser.add_argument("--no-pauses", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tie", type=float, help="log-probabilities as near are a tie (default: by the server's dtype)"
    )
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs (default: a new temporary one)")
    parser.add_argument("--start-timeout", type=float, default=900, metavar="S")
    parser.add_argument("--output", type=Path, help="CSV file that grows by a row a server")
    api_key.add_flag(parser)
    args = parser.parse_args(argv)
    args.targets = targets(parser, args)
    return args


def targets(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Target]:
    """The servers of a command line; a parser error where it names none, or both kinds."""
    if args.api_key is not None:
        os.environ[api_key.VARIABLES[0]] = args.api_key
    if bool(args.endpoints) == bool(args.method):
        parser.error("give running servers as NAME=URL, or servers to start with --method; one of the two")
    named = [entry.partition("=") for entry in args.endpoints]
    if not all(name and url for name, _, url in named):
        parser.error(f"expected NAME=URL, got {' '.join(args.endpoints)}")
    common = ["--model-path", args.model_path, "--attention-backend", "lessismore", "--lim-budget", str(args.budget)]
    common += [*shlex.split(SMALL_POOL.format(pool=args.pool)), *shlex.split(args.server_args)]
    started = [Target(name, arguments=(*common, *shlex.split(SERVERS[name]))) for name in args.method]
    return [Target(name, url=url.rstrip("/")) for name, _, url in named] + started


if __name__ == "__main__":
    command.run(main)
