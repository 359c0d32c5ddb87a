"""Speed of the lossless mode at a given acceptance, prefill skipped, beside a dense backend that decodes step by step.

Random weights accept nothing. So each draft is accepted with a given probability, whatever the model says
(`--lim-drawn-acceptance`); all that a round computes is computed. The prompts' KV is noise, as in `decode_step.py`.

    python -m benchmarks.lossless --model-path benchmarks/shapes/qwen3-8b --baseline fa3 --drafts 6 \\
        --cases 16x32768 64x8192 4x131000 1x32768 1x2048 16x2048 256x2048 --acceptance 0.85 0.9 0.95 \\
        --output out/lossless.csv

A row for each case and acceptance:

- `tokens_per_s`: tokens that rounds answer on average at that acceptance, over their time. A round's time is from the
  end of the round before to its own end, none waited for but as the overlap scheduler does: the host looks at a round
  when it has launched the next. `round_ms` is their median; tokens/s are by their mean, the slowest included.
  `baseline_tokens_per_s` is that of pipelined decode steps of the baseline.
- `drafts`: mean drafts of a round, where the worker adapts them; `accepted`: accepted drafts, as they were drawn.
- `draft_ms`, `verify_ms`, `accept_ms`, `plain_ms`: a draft step, the verification of all drafts, accepting them, and a
  dense decode step of the same server, each launched again and again by itself. `draw_ms`: drawing a draft's token.

Before anything is timed, logits of a verification must be those of the baseline's decode steps up to rounding, for
requests that share nothing and that share a prefix.

`--lim` gives settings as `decode_step.py` takes them: `--lim vary_drafts=off,drafts=unguided`. One device only, on
SGLang 0.5.17.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.decode_step import (
    Backend,
    add_worker_flags,
    checked_cases,
    judge,
    parse_backend,
    run_worker,
    worker_argv,
)
from benchmarks.decode_step_worker import Outcome
from benchmarks.forest import Forest
from benchmarks.lossless_worker import LosslessOutcome, work
from benchmarks.results_file import append_rows, require_columns
from sgl_lim import command

PARTS = ("draft_ms", "draw_ms", "verify_ms", "accept_ms", "plain_ms")
COLUMNS = (
    *("backend", "baseline", "batch", "context", "prefixes", "sampling", "most_drafts", "acceptance"),
    *("drafts", "accepted"),
    *("round_ms", "slowest_round_ms", "tokens_per_s", "baseline_ms", "baseline_tokens_per_s", "ratio", *PARTS),
    *("logits_error_within_budget", "rounds", "error", "command", "machine"),
)


def tokens_of(drafts: Sequence[int], acceptance: float) -> float:
    """Tokens that one request gets on average from rounds of so many drafts each."""
    return math.fsum(acceptance**place for count in drafts for place in range(count + 1))


def lossless_argv(backend: Backend, args: argparse.Namespace) -> list[str]:
    """SGLang's arguments of the lossless server."""
    argv = worker_argv(backend, args)
    more = ["--speculative-algorithm", "LESSISMORE", "--speculative-num-steps", str(args.drafts)]
    # The user's own come last and win.
    place = len(argv) - len(shlex.split(args.sglang_args))
    return [*argv[:place], *more, *argv[place:]]


def make_rows(
    args: argparse.Namespace, backend: Backend, first: Outcome, found: LosslessOutcome, command: str
) -> list[dict[str, Any]]:
    """CSV rows of all cases and acceptances."""
    error, failure = judge(found, first) if args.check else (None, "")
    rows = []
    for case in args.cases:
        dense = first.pipelined.get(str(case))
        for acceptance in args.acceptance:
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row.update(backend=backend.spec, baseline=args.baseline.spec, command=command, machine=found.machine)
            row.update(batch=case.batch, context=case.context, prefixes=case.prefixes, acceptance=acceptance)
            row.update(most_drafts=args.drafts, rounds=args.steps)
            row["sampling"] = " ".join(f"{name}={value:g}" for name, value in args.sampling.items())
            row["logits_error_within_budget"] = "" if error is None else f"{error:.2g}"
            timed = found.rounds.get(f"{case} {acceptance}")
            row["error"] = failure or found.errors.get(str(case)) or ("" if timed else found.error or "not run")
            if timed and not row["error"]:
                row.update(figures(case, acceptance, timed, dense))
                row.update({name: round(ms, 4) for name, ms in found.parts[str(case)].items()})
            rows.append(row)
    return rows


def figures(
    case: Forest, acceptance: float, timed: dict[str, Any], dense: Sequence[float] | None
) -> dict[str, float | str]:
    """Columns of one case at one acceptance; `dense`: milliseconds of the baseline's steps."""
    speed = 1e3 * case.batch * tokens_of(timed["drafts"], acceptance) / math.fsum(timed["ms"])
    row: dict[str, float | str] = {
        "drafts": round(float(np.mean(timed["drafts"])), 2),
        "accepted": round(timed["accepted"], 2),
        "round_ms": round(float(np.median(timed["ms"])), 4),
        "slowest_round_ms": round(max(timed["ms"]), 4),
        "tokens_per_s": round(speed, 1),
    }
    if dense:
        step = float(np.median(dense))
        row["baseline_ms"] = round(step, 4)
        row["baseline_tokens_per_s"] = round(1e3 * case.batch / step, 1)
        row["ratio"] = round(speed * step / (1e3 * case.batch), 3)
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line a case: the baseline's step, the parts of a round, and tokens/s over the baseline's by acceptance."""
    acceptances = list(dict.fromkeys(row["acceptance"] for row in rows))
    heads = ["case", "baseline ms", *PARTS, *(f"at {one}" for one in acceptances)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['batch']} x {row['context']}" + (f" ({row['prefixes']})" if row["prefixes"] else "")
        cases.setdefault(name, []).append(row)
    for name, found in cases.items():
        cells = [row["error"] or f"{row['ratio']}x ({row['drafts']} drafts)" for row in found]
        parts = [str(found[0][column]) for column in ("baseline_ms", *PARTS)]
        lines.append("| " + " | ".join([name, *parts, *cells]) + " |")
    return "\n".join([*lines, "", "tokens/s over the baseline's, and mean drafts a round"])


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a folder; its config.json is enough for dummy weights")
    parser.add_argument("--baseline", type=parse_backend, default=parse_backend("fa3"), help="a dense backend")
    parser.add_argument("--lim", default="", metavar="K=V,…", help="settings of lessismore")
    parser.add_argument("--cases", type=Forest.parse, nargs="+", required=True, metavar="BxC")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.85, 0.9, 0.95], help="of each draft")
    parser.add_argument("--drafts", type=int, default=6, help="most drafts of a round")
    parser.add_argument("--steps", type=int, default=24, help="timed rounds, and timed steps of the baseline")
    parser.add_argument("--warmup", type=int, default=4, help="rounds and steps before them")
    parser.add_argument("--temperature", type=float, default=0.0, help="of all requests; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="of all requests")
    add_worker_flags(parser)
    args = parser.parse_args(argv)
    wrong = [one for one in args.acceptance if not 0 <= one <= 1]
    if wrong:
        parser.error(f"--acceptance must lie between 0 and 1, got {wrong[0]}")
    args.backend = parse_backend(f"lessismore:{args.lim}" if args.lim else "lessismore")
    args.profile, args.sampling = None, {"temperature": args.temperature, "top_p": args.top_p}
    return args


def main() -> None:
    """Run the baseline's worker and that of the lossless mode; print a table, append rows to `--output`."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    args = parse(sys.argv[1:])
    if args.output:
        require_columns(args.output, COLUMNS)
    job: dict[str, Any] = {
        "ranks": 1,
        "shuffle_slots": args.shuffle_slots,
        "warmup": args.warmup,
        "steps": args.steps,
        "profile": None,
        "cases": list(map(str, args.cases)),
        "acceptance": args.acceptance,
        "sparse": "",
        "sampling": args.sampling,
        "checked": checked_cases(args.backend.budget) if args.check else [],
    }
    dense = worker_argv(args.baseline, args)
    print(f"== {args.baseline.spec}: {args.baseline.command(dense)}", file=sys.stderr)
    first = run_worker(args.baseline, {**job, "argv": dense}, args.timeout)
    backend = args.backend
    argv = lossless_argv(backend, args)
    print(f"== {backend.spec}: {backend.command(argv)}", file=sys.stderr)
    found = run_worker(backend, {**job, "argv": argv}, args.timeout, "benchmarks.lossless", LosslessOutcome)
    rows = make_rows(args, backend, first, found, backend.command(argv))
    if args.output:
        append_rows(args.output, COLUMNS, rows)
    print(markdown(rows))


if __name__ == "__main__":
    command.run(main)
