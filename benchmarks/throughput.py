"""Served throughput: a real server a backend, a closed loop of streaming clients, the first server the baseline.

Either against running endpoints, or with servers started here, one after the other:

    python -m benchmarks.throughput dense=http://127.0.0.1:30000 lessismore=http://127.0.0.1:30001
    python -m benchmarks.throughput --common='--model-path models/chain-tracer --device cpu' \\
        --server dense='--attention-backend torch_native' --server lessismore='--attention-backend lessismore'

Starting a server takes long, so several loads can be put on each; a load's rows compare with the first server's:

    python -m benchmarks.throughput dense=http://127.0.0.1:30000 lessismore=http://127.0.0.1:30001 \\
        --load input=3600,output=512 --load input=512,output=2048,concurrency=8,time_limit=60,underway

Before a server is timed it must decode the same tokens to the same logits as the baseline, within the token budget and
within what the baseline differs from itself (answer_check.py has the reasons): `logits_error` at most `logits_limit`,
while over another prompt they would differ by `logits_control`. For the first server `logits_error` is that difference
from itself. A server that fails has no speed. A load that fails leaves the others. Either makes the exit status 1.
`steady_tokens_per_s` counts only while all clients have a running request: with one wave of requests no
prefill falls into it. Servers started here stream increments, because by default each chunk of a stream repeats the
whole answer.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.answer_check import COLUMNS as CHECKED
from benchmarks.answer_check import AnswerCheck, CheckFailed, add_check_flags, chosen_check
from benchmarks.bench_client import run_bench_serving
from benchmarks.closed_loop import LoadError, random_requests, run_load
from benchmarks.figures import Figures, figures
from benchmarks.load_spec import LoadSpec, add_load_flags, chosen_loads
from benchmarks.machine import machine_line_apart
from benchmarks.results_file import append_rows, markdown, ratio, require_columns, rounded
from benchmarks.targets import add_target_flags, chosen_targets, endpoint, flush_cache, log_folder
from sgl_lim import command
from sgl_lim.programs.argument_types import integer
from sgl_lim.programs.endpoint import EndpointError, server_info
from sgl_lim.programs.server_process import ServerFailed
from sgl_lim.programs.server_stats import attended_fraction, parse_server_info
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES

Row = dict[str, Any]
INCREMENTS = "--incremental-streaming-output"
WARMUP_TOKENS = 16
LONG_OUTPUT = 2000  # tokens from which on repeated answers cost more than what is measured
COLUMNS = (
    *("server", "client", "concurrency", "requests", "done", "complete", "input_len", "output_len", "start"),
    *("mean_output", "kv_pool_tokens", "tokens_per_s", "ratio", "steady_tokens_per_s", "steady_ratio", "steady_s"),
    *("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "attended", *CHECKED, "same_answers"),
    *("machine", "command"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Put every load on every server; the exit status is 1 if one has no row."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.output:
        require_columns(args.output, COLUMNS)
    logs = log_folder(args)
    machine = machine_line_apart()
    check = AnswerCheck(chosen_check(args, args.token_range), args.chains, args.facts, args.steps)
    baseline: dict[int, Figures] = {}  # of the first server, by the number of the load
    rows: list[list[Row]] = [[] for _ in args.loads]
    for target in args.targets:
        named = {"server": target.name, "client": args.client, "machine": machine, "command": target.command}
        try:
            with endpoint(target, logs, args.start_timeout) as url:
                for index, result, about in measure_loads(target.name, url, args, check):
                    if target is args.targets[0]:
                        baseline[index] = result
                    cells = {**named, **about, **figure_cells(result, baseline.get(index))}
                    rows[index].append({name: cells[name] for name in COLUMNS})
                    print(json.dumps(rows[index][-1]), file=sys.stderr)
                    if args.output:
                        append_rows(args.output, COLUMNS, rows[index][-1:])
        except (ServerFailed, EndpointError, CheckFailed) as error:
            print(f"error: {target.name}: {error}", file=sys.stderr)
        if not baseline:
            break
    # Load by load, so that servers stand beside one another.
    measured = [row for of_load in rows for row in of_load]
    if measured:
        print(markdown(measured, COLUMNS))
    return int(len(measured) < len(args.targets) * len(args.loads))


def measure_loads(
    name: str, url: str, args: argparse.Namespace, check: AnswerCheck
) -> Iterator[tuple[int, Figures, Row]]:
    """Check one server, then time one load after the other; a load that fails is reported and left out.

    Yields:
        The number of the load, its figures, and the columns that say what was done.

    Raises:
        CheckFailed, EndpointError: the server gives no further figures.
    """
    info = server_info(url)
    answers = {**check.logits(url, info), "same_answers": check.same_answers(url)}
    for index, load in enumerate(args.loads):
        try:
            result, about = measure(url, info, load, args)
        except LoadError as error:
            print(f"error: {name}: {load}: {error}", file=sys.stderr)
        else:
            yield index, result, {**about, **answers}


def measure(url: str, info: Mapping[str, Any], load: LoadSpec, args: argparse.Namespace) -> tuple[Figures, Row]:
    """Time one load; its figures, and the columns that say what was done. `info` is the server's `/server_info`.

    Raises:
        LoadError, EndpointError: the load has no figures.
    """
    concurrency, requests = load.sizes(info)
    lengths = load.input_len, load.output_len
    if args.client == "own" and load.output_len >= LONG_OUTPUT and not info.get("incremental_streaming_output"):
        print(f"warning: {url} repeats the answer in each chunk; start it with {INCREMENTS}", file=sys.stderr)

    load_requests = random_requests(
        requests, *lengths, args.token_range, args.seed, underway=concurrency if load.underway else 0
    )
    # Kernels compile and caches fill at the first long request, which the check does not send.
    if args.client == "own" and args.warmup:
        short = min(WARMUP_TOKENS, load.output_len)
        run_load(url, [replace(r, output_len=short) for r in load_requests[: args.warmup]], args.warmup)
    flush_cache(url)

    before = parse_server_info(server_info(url))
    if args.client == "own":
        received = run_load(url, load_requests, concurrency, load.time_limit)
        if received.client_busy > 0.8:
            busy = f"the client computed {received.client_busy:.0%} of the time"
            print(f"warning: {busy}; raise --stream-interval of the servers", file=sys.stderr)
        result = figures(received, concurrency)
    else:
        result = run_bench_serving(
            url,
            info,
            concurrency=concurrency,
            requests=requests,
            input_len=load.input_len,
            output_len=load.output_len,
            seed=args.seed,
            warmup=args.warmup,
        )
    attended = attended_fraction(before, parse_server_info(server_info(url)))
    if attended.value is None:
        print(f"warning: attended fraction unknown: {attended.note}", file=sys.stderr)
    return result, {
        "concurrency": concurrency,
        "requests": requests,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "start": "underway" if load.underway else "empty",
        "kv_pool_tokens": info["max_total_num_tokens"],
        "attended": rounded(attended.value, 4),
    }


def figure_cells(result: Figures, base: Figures | None) -> Row:
    """The columns of a load's figures; ratios are to `base`, and blank without it."""
    ttft, tpot = result.ttft_ms or (None, None), result.tpot_ms or (None, None)
    return {
        "done": result.done,
        "complete": "yes" if result.complete else "no",
        "mean_output": rounded(result.mean_output, 1),
        "tokens_per_s": rounded(result.tokens_per_s, 2),
        "ratio": ratio(result.tokens_per_s, base.tokens_per_s if base else None),
        "steady_tokens_per_s": rounded(result.steady_tokens_per_s, 2),
        "steady_ratio": ratio(result.steady_tokens_per_s, base.steady_tokens_per_s if base else None),
        "steady_s": rounded(result.steady_s, 2),
        "ttft_p50_ms": rounded(ttft[0], 1),
        "ttft_p99_ms": rounded(ttft[1], 1),
        "tpot_p50_ms": rounded(tpot[0], 2),
        "tpot_p99_ms": rounded(tpot[1], 2),
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `targets` made of the servers it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_flags(parser)
    parser.add_argument("--client", choices=["own", "bench_serving"], default="own")
    add_load_flags(parser)
    parser.add_argument("--token-range", type=int, nargs=2, default=(12, 512), metavar=("LO", "HI"), help="HI excluded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=1, help="requests before each timing, at once")
    add_check_flags(parser)
    parser.add_argument("--chains", type=int, default=0, help="chain problems whose answers are compared")
    parser.add_argument("--facts", type=integer(2, NUM_NODES), default=330)
    parser.add_argument("--steps", type=integer(1, MAX_STEPS), default=24)
    parser.add_argument("--output", type=Path, help="CSV file that grows by a row for each server and load")
    args = parser.parse_args(argv)
    args.loads = chosen_loads(parser, args)
    if args.client == "bench_serving" and any(load.time_limit or load.underway for load in args.loads):
        parser.error("bench_serving knows no time limit and no underway, in --load as by flags; use --client own")
    streaming = [INCREMENTS] if args.client == "own" and INCREMENTS not in args.common else []
    args.targets = chosen_targets(parser, args, more=streaming)
    return args


if __name__ == "__main__":
    command.run(main)
