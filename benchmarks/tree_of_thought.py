"""Tree of thought end to end: how fast does each server grow trees over long contexts? The first is the baseline.

    python -m benchmarks.random_checkpoint benchmarks/shapes/qwen3-8b /dev/shm/qwen3-8b
    python -m benchmarks.tree_of_thought --common='--model-path /dev/shm/qwen3-8b' --trees 1 8 \\
        --server fa3='--attention-backend fa3' --server lessismore='--attention-backend lessismore'
    python -m benchmarks.tree_of_thought dense=http://127.0.0.1:30000 lessismore=http://127.0.0.1:30001 --words v0-399

Every tree is a run of `tree_of_thought` from sgl_lim/programs/reasoning.py over random words of its own; all trees of a
load run at once. All lengths are fixed, ends of text are ignored, and a load that generates anything else has no row.
`tokens_per_s` is end to end: the contexts' prefill (`prefill_s` of `seconds`), then the trees, all of their branches
counted; `trees_tokens_per_s` is without that prefill. `cached` is the share of all prompt tokens that the radix cache
had. A row is of the repeat of median speed. Servers' logits are compared first, as in throughput.py.
"""

import argparse
import json
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.answer_check import COLUMNS as CHECKED
from benchmarks.answer_check import AnswerCheck, CheckFailed, add_check_flags, chosen_check
from benchmarks.load_spec import positive
from benchmarks.machine import machine_line_apart
from benchmarks.results_file import append_rows, markdown, ratio, require_columns, rounded
from benchmarks.targets import add_target_flags, chosen_targets, endpoint, flush_cache, log_folder
from sgl_lim import command
from sgl_lim.programs.endpoint import EndpointError, count_tokens, server_info
from sgl_lim.programs.run_records import Generation
from sgl_lim.programs.server_process import ServerFailed
from sgl_lim.programs.server_stats import attended_fraction, parse_server_info
from sgl_lim.programs.tree_shape import TreeShape

Row = dict[str, Any]
WARMUP_TOKENS = 4
CHECKED_TOKENS = 12, 512  # ids that any vocabulary has
COLUMNS = (
    *("server", "trees", "branches", "keep", "depth", "context", "thought_tokens", "answer_tokens", "output_tokens"),
    *("repeats", "prefill_s", "seconds", "tokens_per_s", "lowest", "highest", "ratio", "trees_tokens_per_s"),
    *("trees_ratio", "attended", "cached", "tokens_shared", "rows_grouped", *CHECKED, "machine", "command"),
)


class LoadFailed(RuntimeError):
    """A load has no figures; the message says what happened."""


@dataclass(frozen=True)
class Load:
    """Trees that grow at once."""

    trees: int
    shape: TreeShape
    answer_tokens: int

    @property
    def output_tokens(self) -> int:
        """What a load generates."""
        return self.trees * (self.shape.branches * self.shape.path_tokens + self.answer_tokens)

    def shortened(self) -> "Load":
        """The same trees with few tokens, for a warm-up."""
        return replace(self, shape=replace(self.shape, thought_tokens=WARMUP_TOKENS), answer_tokens=1)


@dataclass(frozen=True)
class Words:
    """Words to make contexts of, such as w0 … w9999; each should be one token of the model."""

    prefix: str
    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Words":
        """`w0-9999`; ArgumentTypeError for anything else."""
        found = re.fullmatch(r"(\D*)(\d+)-(\d+)", text)
        if not found or int(found[2]) > int(found[3]):
            raise argparse.ArgumentTypeError(f"expected a prefix and a range such as w0-9999, got {text!r}")
        return cls(found[1], int(found[2]), int(found[3]))

    def contexts(self, count: int, length: int, seed: str) -> list[str]:
        """Texts of `length` random words."""
        words = random.Random(seed).choices(
            [f"{self.prefix}{i}" for i in range(self.low, self.high + 1)], k=count * length
        )
        return [" ".join(words[i * length : (i + 1) * length]) for i in range(count)]


def main(argv: Sequence[str] | None = None) -> int:
    """Put every load on every server; the exit status is 1 if one has no row."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.output:
        require_columns(args.output, COLUMNS)
    machine, logs = machine_line_apart(), log_folder(args)
    check = AnswerCheck(chosen_check(args, CHECKED_TOKENS))
    rows: list[Row] = []
    baseline: dict[int, Row] = {}  # of the first server, by the number of trees
    for target in args.targets:
        named = {"server": target.name, "machine": machine, "command": target.command}
        try:
            with endpoint(target, logs, args.start_timeout) as url:
                for row in measure_loads(target.name, url, args, check):
                    if target is args.targets[0]:
                        baseline[row["trees"]] = row
                    cells = {**named, **row, **ratios(row, baseline.get(row["trees"], {}))}
                    rows.append({name: cells[name] for name in COLUMNS})
                    print(json.dumps(rows[-1]), file=sys.stderr)
                    if args.output:
                        append_rows(args.output, COLUMNS, rows[-1:])
        except (ServerFailed, EndpointError, CheckFailed) as error:
            print(f"error: {target.name}: {error}", file=sys.stderr)
        if not rows:
            return 1
    print(markdown(sorted(rows, key=lambda row: args.trees.index(row["trees"])), COLUMNS))
    return int(len(rows) < len(args.targets) * len(args.trees))


def ratios(row: Row, base: Row) -> Row:
    """The columns that compare with the first server's row, blank without one."""
    pairs = {"ratio": "tokens_per_s", "trees_ratio": "trees_tokens_per_s"}
    return {name: ratio(row[of], base.get(of)) for name, of in pairs.items()}


def measure_loads(name: str, url: str, args: argparse.Namespace, check: AnswerCheck) -> Iterator[Row]:
    """Check one server, then time one load after the other; a load that fails is reported and left out.

    Raises:
        CheckFailed, EndpointError: the server gives no further figures.
    """
    checked = check.logits(url, server_info(url))
    for trees in args.trees:
        load = Load(trees, args.shape, args.answer_tokens)
        try:
            yield {**measure(url, load, args), **checked}
        except LoadFailed as error:
            print(f"error: {name}: {trees} trees: {error}", file=sys.stderr)


def measure(url: str, load: Load, args: argparse.Namespace) -> Row:
    """Time one load: the repeat of median speed, and the lowest and highest speed.

    Raises:
        LoadFailed, EndpointError: it has no figures.
    """
    seed = f"{args.seed}/{load.trees}"
    # Kernels compile and buffers grow at the first batch of a size, over contexts that the timed ones do not share.
    grow(url, load.shortened(), args.words.contexts(load.trees, args.context, f"warm-up/{seed}"))
    contexts = args.words.contexts(load.trees, args.context, seed)
    repeats = sorted((time_once(url, load, contexts) for _ in range(args.repeats)), key=lambda r: r["tokens_per_s"])
    ends = {"lowest": repeats[0]["tokens_per_s"], "highest": repeats[-1]["tokens_per_s"]}
    return {**repeats[len(repeats) // 2], **ends, "repeats": len(repeats)}


def time_once(url: str, load: Load, contexts: Sequence[str]) -> Row:
    """The columns of one repeat, from an empty cache."""
    flush_cache(url)
    before = server_info(url)
    generations, prefill_s, trees_s = grow(url, load, contexts)
    after = server_info(url)
    attended = attended_fraction(parse_server_info(before), parse_server_info(after))
    if attended.value is None:
        print(f"warning: attended fraction unknown: {attended.note}", file=sys.stderr)
    counted = count_tokens(url, contexts)
    cached, prompts = (sum(getattr(g, name) for g in generations) for name in ("cached_tokens", "prompt_tokens"))
    return {
        **vars(load.shape),
        "trees": load.trees,
        "context": round(sum(counted) / len(counted)) if counted else "",
        "answer_tokens": load.answer_tokens,
        "output_tokens": load.output_tokens,
        "prefill_s": round(prefill_s, 3),
        "seconds": round(prefill_s + trees_s, 3),
        "tokens_per_s": round(load.output_tokens / (prefill_s + trees_s), 2),
        "trees_tokens_per_s": round(load.output_tokens / trees_s, 2),
        "attended": rounded(attended.value, 4),
        "cached": round(cached / prompts, 4),
        **{name: increase(before, after, name) for name in ("tokens_shared", "rows_grouped")},
    }


def grow(url: str, load: Load, contexts: Sequence[str]) -> tuple[list[Generation], float, float]:
    """Prefill all contexts, then grow a tree over each, all at once; both take seconds.

    Raises:
        LoadFailed: a request failed, or generated less or more than it was to.
    """
    from sgl_lim.programs.reasoning import connect, make_ask

    most = load.shape.path_tokens + load.answer_tokens
    with ThreadPoolExecutor(load.trees) as threads:
        try:
            backend = connect(url)
            ask = make_ask(backend, num_samples=None, chat=False, tree=load.shape, max_new_tokens=most, ignore_eos=True)
            begin = time.monotonic()
            list(threads.map(backend.cache_prefix, contexts))
            prefilled = time.monotonic()
            generations = [generation for found in threads.map(ask, contexts) for generation in found]
            end = time.monotonic()
        except (OSError, RuntimeError) as error:
            raise LoadFailed(f"{type(error).__name__}: {error}") from error
    tokens = sum(generation.completion_tokens + generation.other_tokens for generation in generations)
    if tokens != load.output_tokens:
        raise LoadFailed(f"{tokens} tokens were generated instead of {load.output_tokens}")
    return generations, prefilled - begin, end - prefilled


def increase(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> int | str:
    """By how much one of our counters grew between two answers of `/server_info`; blank where there is none."""
    looks = [
        [state["lessismore"]["counters"][name] for state in info["internal_states"] if "lessismore" in state]
        for info in (before, after)
    ]
    return sum(looks[1]) - sum(looks[0]) if all(looks) else ""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `targets` made of the servers it names, and the trees' `shape`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_flags(parser)
    parser.add_argument("--trees", type=positive, nargs="+", default=[1, 8], help="at once; a load each")
    parser.add_argument("--branches", type=positive, default=8, help="thoughts of a round, a multiple of --keep")
    parser.add_argument("--keep", type=positive, default=2, help="paths that a round leaves")
    parser.add_argument("--depth", type=positive, default=2, help="rounds before the answer")
    parser.add_argument("--thought-tokens", type=positive, default=512)
    parser.add_argument("--answer-tokens", type=positive, default=32)
    parser.add_argument("--context", type=positive, default=16384, help="words of each tree's prompt")
    parser.add_argument("--words", type=Words.parse, default="w0-9999", help="of prompts (default: w0-9999)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=positive, default=3, help="of each load; the one of median speed is shown")
    add_check_flags(parser)
    parser.add_argument("--output", type=Path, help="CSV file that grows by a row for each server and load")
    args = parser.parse_args(argv)
    if args.branches % args.keep:
        parser.error(f"--branches {args.branches} must be a multiple of --keep {args.keep}")
    args.shape = TreeShape(args.branches, args.keep, args.depth, args.thought_tokens)
    args.targets = chosen_targets(parser, args)
    return args


if __name__ == "__main__":
    command.run(main)
