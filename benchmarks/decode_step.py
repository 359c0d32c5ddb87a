"""Latency of one decode step of SGLang backends by batch and context, prefill skipped, first backend the baseline.

Each backend runs in a process of its own: one model load, all cases. A case `BxC` is B requests of C tokens each that
share nothing; `4x16384/8x256` is 4 prefixes of 16384 tokens and behind each 8 requests with 256 tokens of their own, to
any depth. Their KV slots are allocated as a prefill would, the pool holds normal noise, and no prefill is computed. A
step is one forward pass with greedy sampling, timed in two ways that see the same tokens:

- alone (`step_ms`, `p20_ms`, `p80_ms`, `ratio`, `tokens_per_s`): on the host, between two device synchronisations. What
  the host prepares before the device can begin counts in full, and so does its noise.
- pipelined (`pipelined_*`): all steps are enqueued with no synchronisation in between, and a step's time is from the
  device's event after the step before it to the one after it. The host prepares a step while the device runs earlier
  ones, as under a server's overlap scheduler, and counts only where it is the slower of the two. Devices without events
  (a CPU) are timed on the host.

Both are medians. With `selection_interval` steps differ: `pipelined_mean_*` are means, for `--steps` a multiple of it.

The query of step i (from 0, `--warmup` steps first) attends to C + i + 1 tokens, so the timed ones see C + warmup + 1
to C + warmup + steps. Dummy weights are SGLang's, seeded, except that norms multiply by 1: as loaded, they scale
queries to nearly nothing, all tokens score alike, and neither a selection nor an error in it would show.

Before anything is timed, every backend decodes two steps of two requests that share nothing and of two that share a
prefix, within every budget, with the same weights, tokens, keys and values; its logits must be the first backend's up
to rounding. Beyond the budget they must be finite.
A backend that fails has no speed. Which tokens a selection picks beyond the budget is not checked here.

    python -m benchmarks.decode_step --model-path M --backends fa3 lessismore:budget=2048,aggregate=max \\
        --cases 1x2048 16x32768 1x32768/16x256 --output out/decode_step.csv --sglang-args='--mem-fraction-static 0.85'

With `--tp-size N` a model's heads are spread over N devices. Each has a process, all take the same steps, and the first
device's times are reported.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.decode_step_worker import Outcome, work
from benchmarks.forest import Forest
from benchmarks.ranks import on_every_rank
from benchmarks.results_file import append_rows, require_columns
from sgl_lim import command
from sgl_lim.methods import LessIsMore
from sgl_lim.settings.config import ENV, LimConfig, RefusedConfig, configure

LARGEST_LOGITS_ERROR = 0.05
CHECKED_REQUESTS = 2
ALONE = ("step_ms", "p20_ms", "p80_ms", "ratio")
PIPELINED = ("pipelined_ms", "pipelined_p20_ms", "pipelined_p80_ms", "pipelined_ratio")
MEAN = ("pipelined_mean_ms", "pipelined_mean_ratio")
COLUMNS = (
    *("backend", "batch", "context", "prefixes", *ALONE, "tokens_per_s", *PIPELINED, *MEAN),
    *("logits_error_within_budget", "slots", "steps", "error", "command", "machine"),
)


@dataclass(frozen=True)
class Backend:
    """A backend as the command line names it."""

    spec: str
    name: str
    lim: LimConfig | None
    environment: dict[str, str]

    @property
    def budget(self) -> int | None:
        """Tokens that a sparse layer reads; None where nothing is sparse."""
        return None if self.lim is None else self.lim.build().settings().get("budget")

    def command(self, argv: list[str]) -> str:
        """The worker's environment and SGLang arguments, as a shell would take them."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(argv)])


def parse_backend(spec: str) -> Backend:
    """`fa3`, or `lessismore:budget=2048,selection_layers=2-12` with the keys of `configure`."""
    name, _, settings = spec.partition(":")
    if name != "lessismore":
        if settings:
            raise argparse.ArgumentTypeError(f"only lessismore takes settings, got {spec!r}")
        return Backend(spec, name, None, {})
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        values[key] = [int(i) for i in value.split("-")] if key == "selection_layers" else _scalar(value)
    try:
        # JSON has lists, and the configuration tuples.
        lim = configure(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except RefusedConfig as refused:
        raise argparse.ArgumentTypeError(f"{spec!r}: {'; '.join(refused.reasons)}") from None
    if problems := lim.problems():
        raise argparse.ArgumentTypeError(f"{spec!r}: {'; '.join(problems)}")
    return Backend(spec, name, lim, {ENV: json.dumps(values)})


def _scalar(text: str) -> bool | int | float | str:
    if text in ("on", "off"):
        return text == "on"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def run_worker(
    backend: Backend, job: dict[str, Any], timeout: float, module: str = "benchmarks.decode_step", kind: Any = Outcome
) -> Any:
    """Run one backend's worker, its output on our stderr: `module --worker`, which leaves an outcome of this kind."""
    environment = {k: v for k, v in os.environ.items() if k != ENV} | backend.environment
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcome.pt")
        command = [
            sys.executable,
            "-m",
            module,
            "--worker",
            json.dumps({**job, "outcome": str(path)}),
        ]
        try:
            status = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=timeout).returncode
            ending = f"the worker ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ending = f"the worker took more than {timeout:g} s"
        outcome = kind(**torch.load(path)) if path.exists() else kind(error="the worker left nothing")
    outcome.error = ending or outcome.error
    return outcome


def worker_argv(backend: Backend, args: argparse.Namespace, ranks: int = 1) -> list[str]:
    """SGLang's arguments, the same for all backends but for the backend's name; the user's come last and win."""
    cases = [args.profile] if args.profile else args.cases
    batches = sorted({case.batch for case in cases} | ({CHECKED_REQUESTS} if args.check else set()))
    return [
        *("--model-path", args.model_path, "--attention-backend", backend.name),
        *("--load-format", "dummy", "--skip-tokenizer-init"),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--disable-prefill-cuda-graph", "--cuda-graph-bs-decode", *map(str, batches)),
        *(("--tp-size", str(ranks)) if ranks > 1 else ()),
        *shlex.split(args.sglang_args),
    ]


def checked_cases(budget: int) -> list[str]:
    """Batches whose logits are compared: half the budget long, without and with a shared prefix."""
    tokens = max(1, budget // 2)
    # Of whole pages, whatever the page size, unless the budget is tiny.
    shared = tokens * 7 // 8 // 64 * 64 or tokens // 2
    return [f"{CHECKED_REQUESTS}x{tokens}", *([f"1x{shared}/{CHECKED_REQUESTS}x{tokens - shared}"] if shared else [])]


def logits_error(logits: Tensor, baseline: Tensor) -> float:
    """Largest ‖a − b‖ / ‖b‖ over steps and requests; NaN if anything is not finite."""
    return float(((logits - baseline).norm(dim=-1) / baseline.norm(dim=-1)).max())


def judge(outcome: Outcome, first: Outcome) -> tuple[float | None, str]:
    """The logits error against the first backend and, if this output must not be trusted, why."""
    if outcome.logits is None:
        return None, outcome.error or "check failed"
    if first.logits is None:
        return None, "check failed: the first backend has no logits"
    error = logits_error(outcome.logits, first.logits)
    # Not `>`: a NaN must fail.
    return error, "" if outcome.finite and error <= LARGEST_LOGITS_ERROR else "check failed"


def check_figures(outcome: Outcome, first: Outcome) -> str:
    """What a failed check found beside its limit, for the log; blank if it passed or found nothing."""
    error, failure = judge(outcome, first)
    if not failure or error is None or outcome.logits is None:
        return ""
    found = f"logits_error_within_budget {error:.2g}, limit {LARGEST_LOGITS_ERROR:g}"
    if not outcome.finite:
        where = "beyond" if bool(outcome.logits.isfinite().all()) else "within"
        found += f"; logits {where} the budget are not all finite"
    return found


def timing(names: Sequence[str], times: Sequence[float], baseline: Sequence[float] | None) -> dict[str, float]:
    """Columns of one way of timing, by `names`: median, p20, p80 and, with a baseline's times, the ratio to it."""
    p20, median, p80 = (float(p) for p in np.percentile(times, [20, 50, 80]))
    found = [round(median, 4), round(p20, 4), round(p80, 4)]
    if baseline:
        found.append(round(float(np.median(baseline)) / median, 3))
    return dict(zip(names, found, strict=False))


def mean(times: Sequence[float], baseline: Sequence[float] | None) -> dict[str, float]:
    """Columns `MEAN`, the second with a baseline's times."""
    found = [round(float(np.mean(times)), 4)]
    if baseline:
        found.append(round(float(np.mean(baseline) / np.mean(times)), 3))
    return dict(zip(MEAN, found, strict=False))


def make_rows(
    backend: Backend, outcome: Outcome, first: Outcome, cases: Sequence[Forest], check: bool = True, **more: Any
) -> list[dict[str, Any]]:
    """CSV rows of one backend; `more` fills further columns. `first` may be `outcome` itself."""
    deviation, failure = judge(outcome, first) if check else (None, "")
    rows = []
    for case in cases:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row.update(backend=backend.spec, batch=case.batch, context=case.context, prefixes=case.prefixes, **more)
        row["machine"] = outcome.machine or first.machine
        row["logits_error_within_budget"] = "" if deviation is None else f"{deviation:.2g}"
        name = str(case)
        times = outcome.times.get(name)
        row["error"] = failure or outcome.errors.get(name) or ("" if times else outcome.error or "not run")
        if times and not row["error"]:
            row.update(timing(ALONE, times, first.times.get(name)))
            row.update(timing(PIPELINED, outcome.pipelined[name], first.pipelined.get(name)))
            row.update(mean(outcome.pipelined[name], first.pipelined.get(name)))
            row["tokens_per_s"] = round(1e3 * case.batch / float(np.median(times)), 1)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Cases down, backends across: milliseconds a step and the ratio to the first backend, alone / pipelined."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells: dict[tuple[int, int, str], dict[str, str]] = {}
    for row in rows:
        cell = row["error"] or f"{row['step_ms']:.2f} / {row['pipelined_ms']:.2f}"
        if not row["error"] and row["ratio"] != "" and row["backend"] != backends[0]:
            cell += f" ({row['ratio']:.2f}x / {row['pipelined_ratio']:.2f}x)"
        cells.setdefault((row["batch"], row["context"], row["prefixes"]), {})[row["backend"]] = cell
    lines = [["batch", "context", "prefixes", *backends], ["---"] * (3 + len(backends))]
    lines += [[*map(str, case), *(found.get(name, "") for name in backends)] for case, found in cells.items()]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", "ms a step, alone / pipelined (times as fast as the first backend)"])


def kernel_table(kernels: list[tuple[str, int, float]], longest: int = 25) -> str:
    """The longest kernels as text, microseconds first."""
    lines = [f"{sum(us for *_, us in kernels):12.1f} us in {sum(n for _, n, _ in kernels)} launches, in all"]
    for name, count, us in kernels[:longest]:
        lines.append(f"{us:12.1f} us {count:6d} x  {name.removeprefix('void ')[:100]}")
    return "\n".join(lines)


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """What a benchmark takes that runs backends in processes of their own: see `run_worker`."""
    parser.add_argument(
        "--shuffle-slots", action="store_true", help="scatter the KV slots as a long-running server does"
    )
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare logits first")
    parser.add_argument(
        "--sglang-args", default="", help="further SGLang arguments, quoted: --sglang-args='--device cpu'"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a backend may take")
    parser.add_argument("--output", type=Path, help="CSV file to append to")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a folder; its config.json is enough for dummy weights")
    parser.add_argument(
        "--backends",
        type=parse_backend,
        nargs="+",
        required=True,
        help="fa3, lessismore:key=value,...; first: baseline",
    )
    parser.add_argument("--cases", type=Forest.parse, nargs="+", default=[], metavar="BxC", help="see above")
    parser.add_argument("--steps", type=int, default=24, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument(
        "--profile", type=Forest.parse, metavar="BxC", help="list the kernels of one step; time nothing"
    )
    parser.add_argument("--tp-size", type=int, default=1, metavar="N", help="devices (default: %(default)s)")
    add_worker_flags(parser)
    args = parser.parse_args(argv)
    if args.tp_size < 1:
        parser.error("--tp-size must be at least 1")
    if bool(args.cases) == bool(args.profile):
        parser.error("give either --cases or --profile")
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    args.check = args.check and not args.profile
    return args


def main() -> None:
    """Run every backend's worker in turn; print a table, append rows to `--output`."""
    if sys.argv[1:2] == ["--worker"]:
        on_every_rank(work, json.loads(sys.argv[2]))
        return
    args = parse(sys.argv[1:])
    if args.output:
        require_columns(args.output, COLUMNS)
    budgets = [backend.budget for backend in args.backends if backend.budget] or [LessIsMore.budget]
    rows: list[dict[str, Any]] = []
    first: Outcome | None = None
    for backend in args.backends:
        worker = worker_argv(backend, args, args.tp_size)
        print(f"== {backend.spec}: {backend.command(worker)}", file=sys.stderr)
        job = {
            "argv": worker,
            "ranks": args.tp_size,
            "shuffle_slots": args.shuffle_slots,
            "warmup": args.warmup,
            "steps": args.steps,
            "cases": list(map(str, args.cases)),
            "profile": args.profile and str(args.profile),
            "checked": checked_cases(min(budgets)) if args.check else [],
            "sparse": f"{CHECKED_REQUESTS}x{4 * backend.budget}" if args.check and backend.budget else "",
        }
        outcome = run_worker(backend, job, args.timeout)
        if args.profile:
            print(f"\n{backend.spec}\n{outcome.error or kernel_table(outcome.kernels)}", flush=True)
            continue
        first = first or outcome
        if args.check and (figures := check_figures(outcome, first)):
            print(f"{backend.spec}: check failed: {figures}", file=sys.stderr)
        slots = "shuffled" if args.shuffle_slots else "contiguous"
        more = {"slots": slots, "steps": args.steps, "command": backend.command(worker)}
        found = make_rows(backend, outcome, first, args.cases, args.check, **more)
        if args.output:
            append_rows(args.output, COLUMNS, found)
        rows += found
    if rows:
        print(markdown(rows))


if __name__ == "__main__":
    command.run(main)
