"""Served throughput: a real server a backend, a closed loop of streaming clients, the first server the baseline.

Either against running endpoints, or with servers started here, one after the other:

    python benchmarks/throughput.py dense=http://127.0.0.1:30000 lessismore=http://127.0.0.1:30001
    python benchmarks/throughput.py --common='--model-path models/chain-tracer --device cpu' \\
        --server dense='--attention-backend torch_native' --server lessismore='--attention-backend lessismore'

Before a server is timed, its greedy answers to prompts that stay inside the token budget are compared with the
baseline's; where too few tokens agree, no speed is given and the exit status is 1. `steady_tokens_per_s` counts only
while all clients have a running request: with one wave of requests no prefill falls into it. Servers started here
stream increments, because by default each chunk of a stream repeats the whole answer.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from answer_check import AnswerCheck, CheckFailed
from bench_client import run_bench_serving
from closed_loop import LoadError, random_requests, run_load
from figures import Figures, figures
from own_server import ServerFailed, launch_command, own_server
from results_file import append_rows

from sgl_lim.programs.endpoint import EndpointError, server_info
from sgl_lim.programs.server_stats import attended_fraction, parse_server_info

INCREMENTS = "--incremental-streaming-output"
WARMUP_TOKENS = 16
LONG_OUTPUT = 2000  # tokens from which on repeated answers cost more than what is measured


@dataclass(frozen=True)
class Target:
    """One server to measure: an endpoint that runs, or the arguments that start one."""

    name: str
    url: str | None = None
    arguments: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every server; the exit status is 1 if one could not be started, checked or measured."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logs = args.logs or Path(tempfile.mkdtemp(prefix="throughput-"))
    machine = machine_line_apart()
    check = AnswerCheck(
        prompts=args.check,
        length=args.check_len[0],
        new_tokens=args.check_len[1],
        token_range=args.token_range,
        seed=args.seed + 1,
        threshold=args.check_threshold,
        chains=args.chains,
        facts=args.facts,
        steps=args.steps,
    )
    baseline: Figures | None = None
    rows, failed = [], False
    for target in args.targets:
        try:
            with endpoint(target, logs, args.start_timeout) as url:
                row, result = measure(url, args, check, baseline)
        except (ServerFailed, EndpointError, CheckFailed, LoadError) as error:
            print(f"error: {target.name}: {error}", file=sys.stderr)
            failed = True
            if baseline is None:
                break
            continue
        baseline = baseline or result
        command = "" if target.url else launch_command(target.arguments)
        rows.append({"server": target.name, "client": args.client, **row, "machine": machine, "command": command})
        print(json.dumps(rows[-1]), file=sys.stderr)
        if args.output:
            append_row(args.output, rows[-1])
    if rows:
        print(markdown(rows))
    return int(failed)


def measure(
    url: str, args: argparse.Namespace, check: AnswerCheck, baseline: Figures | None
) -> tuple[dict[str, Any], Figures]:
    """Check and time one server; the columns that depend on it, and the figures. The baseline has no `baseline`.

    Raises:
        CheckFailed, LoadError, EndpointError: the server has no figures.
    """
    info = server_info(url)
    concurrency = args.concurrency or fitting_concurrency(info, args.input_len, args.output_len)
    requests = args.requests or concurrency * (1 + args.underway)
    concurrency = min(concurrency, requests)
    if args.client == "own" and args.output_len >= LONG_OUTPUT and not info.get("incremental_streaming_output"):
        print(f"warning: {url} repeats the answer in each chunk; start it with {INCREMENTS}", file=sys.stderr)

    same_tokens, same_answers = check.same_tokens(url, info), check.same_answers(url)
    lengths = args.input_len, args.output_len
    load_requests = random_requests(
        requests, *lengths, args.token_range, args.seed, underway=concurrency if args.underway else 0
    )
    # Kernels compile and caches fill at the first long request, which the check does not send.
    if args.client == "own" and args.warmup:
        short = min(WARMUP_TOKENS, args.output_len)
        run_load(url, [replace(r, output_len=short) for r in load_requests[: args.warmup]], args.warmup)
    flush_cache(url)

    before = parse_server_info(server_info(url))
    if args.client == "own":
        load = run_load(url, load_requests, concurrency, args.time_limit)
        if load.client_busy > 0.8:
            busy = f"the client computed {load.client_busy:.0%} of the time"
            print(f"warning: {busy}; raise --stream-interval of the servers", file=sys.stderr)
        result = figures(load, concurrency)
    else:
        result = run_bench_serving(
            url,
            info,
            concurrency=concurrency,
            requests=requests,
            input_len=args.input_len,
            output_len=args.output_len,
            seed=args.seed,
            warmup=args.warmup,
        )
    attended = attended_fraction(before, parse_server_info(server_info(url)))
    if attended.value is None:
        print(f"warning: attended fraction unknown: {attended.note}", file=sys.stderr)
    base = baseline or result
    ttft, tpot = result.ttft_ms or (None, None), result.tpot_ms or (None, None)
    row = {
        "concurrency": concurrency,
        "requests": requests,
        "done": result.done,
        "complete": "yes" if result.complete else "no",
        "input_len": args.input_len,
        "output_len": args.output_len,
        "start": "underway" if args.underway else "empty",
        "mean_output": rounded(result.mean_output, 1),
        "kv_pool_tokens": info["max_total_num_tokens"],
        "tokens_per_s": rounded(result.tokens_per_s, 2),
        "ratio": ratio(result.tokens_per_s, base.tokens_per_s),
        "steady_tokens_per_s": rounded(result.steady_tokens_per_s, 2),
        "steady_ratio": ratio(result.steady_tokens_per_s, base.steady_tokens_per_s),
        "steady_s": rounded(result.steady_s, 2),
        "ttft_p50_ms": rounded(ttft[0], 1),
        "ttft_p99_ms": rounded(ttft[1], 1),
        "tpot_p50_ms": rounded(tpot[0], 2),
        "tpot_p99_ms": rounded(tpot[1], 2),
        "attended": rounded(attended.value, 4),
        "same_tokens": rounded(same_tokens, 3),
        "same_answers": same_answers,
    }
    return row, result


def fitting_concurrency(info: Mapping[str, Any], input_len: int, output_len: int) -> int:
    """How many requests fill the KV pool without waiting for one another, by an answer of `/server_info`.

    The scheduler admits a request where its tokens and one page more are free.
    """
    groups = info["internal_states"]
    page = info.get("page_size") or 1
    pages = -(-(input_len + output_len) // page) + 1
    fitting = max(1, info["max_total_num_tokens"] // (pages * page))
    most = groups[0].get("effective_max_running_requests_per_dp") or info.get("max_running_requests")
    return (min(fitting, most) if most else fitting) * len(groups)


@contextmanager
def endpoint(target: Target, logs: Path, timeout: float) -> Iterator[str]:
    """The target's URL; a server of its own runs as long as the context."""
    if target.url:
        yield target.url
    else:
        log = logs / f"{target.name}.log"
        print(f"starting {target.name}, log {log}", file=sys.stderr)
        with own_server(target.arguments, log, timeout=timeout) as url:
            yield url


def flush_cache(url: str) -> None:
    """Empty the radix cache, so that no prompt is found there.

    Raises:
        EndpointError: the server did not, for instance because other clients' requests run.
    """
    try:
        urllib.request.urlopen(f"{url}/flush_cache?timeout=60", data=b"", timeout=90).close()
    except OSError as error:
        raise EndpointError(f"{url}/flush_cache: {error}; do other clients use the server?") from error


def machine_line_apart() -> str:
    """The machine line from a process of its own: this one must hold no memory of the device beside the servers."""
    command = [sys.executable, "-c", "from machine import machine_line; print(machine_line())"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def rounded(value: float | None, digits: int) -> float | str:
    """A table's cell; blank where there is no value."""
    return "" if value is None else round(value, digits)


def ratio(value: float | None, baseline: float | None) -> float | str:
    """`value` of `baseline`; blank where one is missing."""
    return round(value / baseline, 2) if value is not None and baseline else ""


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a CSV file, with a header if the file is new; exit if it is another benchmark's."""
    if path.exists() and path.read_text().split("\n", 1)[0].strip() != ",".join(row):
        raise SystemExit(f"error: {path} has other columns than {','.join(row)}; give another --output")
    append_rows(path, list(row), [row])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the rows; what does not fit into one stands below it."""
    columns = [name for name in rows[0] if name not in ("machine", "command")]
    lines = [columns, ["---"] * len(columns), *([str(row[name]) for name in columns] for row in rows)]
    below = [rows[0]["machine"], *(f"{row['server']}: `{row['command']}`" for row in rows if row["command"])]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *below])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `targets` made of the servers it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoints", nargs="*", metavar="NAME=URL", help="running servers; the first is the baseline")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=ARGUMENTS", help="a server to start")
    parser.add_argument("--common", default="", metavar="ARGUMENTS", help="launch arguments of all servers to start")
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs (default: a new temporary one)")
    parser.add_argument("--start-timeout", type=float, default=900, metavar="S")
    parser.add_argument("--client", choices=["own", "bench_serving"], default="own")
    parser.add_argument(
        "--concurrency",
        type=lambda text: None if text == "auto" else positive(text),
        metavar="N",
        help="clients; auto (the default): as many as fill the server's KV pool",
    )
    parser.add_argument("--requests", type=positive, help="in all (default: one a client; two with --underway)")
    parser.add_argument("--input-len", type=positive, default=3600, help="prompt tokens")
    parser.add_argument("--output-len", type=positive, default=512, help="tokens to generate")
    parser.add_argument(
        "--underway",
        action="store_true",
        help="begin as a loop that has run for long: the first request of each client has a part of its output in its "
        "prompt, evenly spread. With --time-limit the steady figures then need no whole generation",
    )
    parser.add_argument("--token-range", type=int, nargs=2, default=(12, 512), metavar=("LO", "HI"), help="HI excluded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=1, help="requests before timing, at once")
    parser.add_argument("--time-limit", type=float, metavar="S", help="abort what runs after S seconds of load")
    parser.add_argument("--check", type=int, default=4, help="prompts whose answers are compared (0: none)")
    parser.add_argument("--check-len", type=positive, nargs=2, default=(96, 32), metavar=("IN", "OUT"), help="tokens")
    parser.add_argument(
        "--check-threshold", type=float, default=0.5, help="least fraction of leading tokens that agree"
    )
    parser.add_argument("--chains", type=int, default=0, help="chain problems whose answers are compared")
    parser.add_argument("--facts", type=int, default=330)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, help="CSV file to which a row a server is appended")
    args = parser.parse_args(argv)
    if bool(args.endpoints) == bool(args.server):
        parser.error("give running servers as NAME=URL, or servers to start with --server; one of the two")
    if args.client == "bench_serving" and (args.time_limit or args.underway):
        parser.error("bench_serving knows no --time-limit and no --underway; use --client own")
    named = [entry.partition("=") for entry in args.endpoints or args.server]
    names = [name for name, _, _ in named]
    if not all(name and value for name, _, value in named) or len(set(names)) < len(names):
        parser.error(f"expected NAME=… with a name of its own for each server, got {', '.join(names)}")
    if args.endpoints:
        args.targets = [Target(name, url=url.rstrip("/")) for name, _, url in named]
    else:
        streaming = [INCREMENTS] if args.client == "own" and INCREMENTS not in args.common else []
        common = [*shlex.split(args.common), *streaming]
        args.targets = [Target(name, arguments=(*common, *shlex.split(more))) for name, _, more in named]
    return args


def positive(text: str) -> int:
    """A number above 0, from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
