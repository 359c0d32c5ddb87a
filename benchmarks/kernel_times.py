"""Kernels by themselves on one CUDA device: correctness first, then microseconds and GB/s, FA3's beside ours.

    python -m benchmarks.kernel_times --output out/kernels.csv
    python -m benchmarks.kernel_times --sections layer --cases 16x32768 --quick
    python -m benchmarks.kernel_times --sections selection --no-flashinfer
    python -m benchmarks.kernel_times --sections grouped --forests 1x32768/16x256 16x32768

Sections, on a model layer's shape (Qwen3-8B's by default):
- sparse_decode: attention over a budget of tokens; FA3 over the same slots.
- decode_with_scores: dense attention that also writes every head's logits; FA3's dense attention over the same slots.
- score_context: every head's logits from keys alone, which `gb_per_s` counts alone.
- selection: logits to scores, scores to the chosen tokens' slots, for heads that agree and heads that do not;
  FlashInfer's top-k of the same scores where it can be compiled, which can take minutes (`--no-flashinfer`: without).
- layer: a whole selection layer in one graph, against FA3's dense layer. It attends to the context, as in the paper, or
  scores the context by its keys and attends to its set; `gb_per_s` then counts those keys, and keys and values of the
  sets. At 16x32768 the target is a ratio of at most 1.2, and 400 us by `max` where it attends to its set.
- grouped: dense attention of rows that share prefixes, level by level from the root: `1x4096/4x12288/8x256` is a prefix
  of 4096 tokens, behind it 4 of 12288, behind each 8 rows with 256 of their own. Ours in groups, and finding them; ours
  over every row's slots; scores by groups, and whole selection layers; FA3; FlashInfer's cascade, whose levels are
  planned before anything is timed.

Before a kernel is timed, its output is compared with the float64 reference in at most four rows (`deviation`: relative
for attention, of log-weights for scores, the share of tokens that differ for sets); beyond the limit it has no time.
Times are of CUDA graphs whose calls rotate over keys and values that L2 cannot hold; slots are scattered. Selection
reads what attention has just written, and may find it in L2 as in a layer. `gb_per_s` counts keys and values once, and
`share_of_copy` is beside the best device copy of the same run; in `grouped` the shared ones count once as well, for
all implementations. `ratio_to_fa3` is our time over FA3's: less is better.
A baseline that cannot be imported has no rows, or rows with the error. Uses about 13 GiB of device memory by default.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.forest import Forest
from benchmarks.kernel_forests import CASCADES, Cascade, flashinfer_cascades
from benchmarks.kernel_operands import Dense, GraphTimer, Shape, TopK, load_fa3, load_flashinfer
from benchmarks.kernel_sections import COLUMNS, DTYPES, SECTIONS, Bench, Case, Row
from benchmarks.machine import machine_line
from benchmarks.results_file import append_rows, require_columns
from sgl_lim import command

QUICK_REPLAYS = 3
_NAMES = ("section", "op", "implementation", "batch", "context", "prefixes", "aggregate")


def markdown(rows: list[Row]) -> str:
    """One table a section, without the columns that are blank throughout it."""
    lines: list[str] = []
    for section in dict.fromkeys(row["section"] for row in rows):
        found = [row for row in rows if row["section"] == section]
        shown = [c for c in COLUMNS if c not in ("section", "machine") and any(row[c] != "" for row in found)]
        table = [shown, ["---"] * len(shown), *([str(row[c]) for c in shown] for row in found)]
        lines += ["", f"### {section}", "", *(f"| {' | '.join(line)} |" for line in table)]
    return "\n".join(lines[1:])


def parse_case(text: str) -> Case:
    """`16x32768` as (16, 32768): rows, tokens of context each."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected ROWSxTOKENS such as 16x32768, got {text!r}")
    batch, context = text.split("x")
    return int(batch), int(context)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--heads", type=positive, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--dim", type=positive, default=128, help="of a head")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--budget", type=positive, default=2048, help="tokens; a quarter of them the recency window")
    cases = ["16x32768", "64x8192", "256x2048", "1x32768", "4x131072"]
    parser.add_argument("--cases", type=parse_case, nargs="+", default=[parse_case(c) for c in cases], metavar="BxC")
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=[1, 4, 16, 64, 256], help="rows of the section sparse_decode"
    )
    forests = ["1x32768/16x256", "1x8192/64x256", "4x16384/8x256", "1x4096/4x12288/8x256", "16x32768"]
    parser.add_argument(
        "--forests",
        type=Forest.parse,
        nargs="+",
        default=[Forest.parse(forest) for forest in forests],
        metavar="NxT/NxT",
        help="of the section grouped: levels from the root, N under each node of the level before, T tokens each",
    )
    parser.add_argument(
        "--cascades",
        nargs="+",
        choices=CASCADES,
        default=list(CASCADES),
        help="FlashInfer's kernels for the section grouped: FA2's, which SGLang compiles as well, or its own choice, "
        "which can take minutes to compile on Hopper",
    )
    parser.add_argument("--granule", type=positive, default=128, help="tokens that shared prefixes are multiples of")
    parser.add_argument("--replays", type=positive, default=11, help="of every graph; a figure is their median")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPLAYS} replays: for a look, not for a report")
    parser.add_argument(
        "--no-flashinfer",
        dest="flashinfer",
        action="store_false",
        help="no FlashInfer top-k and no cascade, nothing to compile for them",
    )
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    args = parser.parse_args(argv)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.budget < 8:
        parser.error(f"--budget {args.budget} must be at least 8: four sinks, and a quarter for the window")
    if args.quick:
        args.replays = QUICK_REPLAYS
    return args


def load(name: str, loader: Callable[[], Any]) -> Any:
    """A baseline, or None and a line on stderr."""
    try:
        return loader()
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
        print(f"no {name}: its figures stay blank ({line})", file=sys.stderr)
        return None


def load_baselines(
    args: argparse.Namespace, device: torch.device
) -> tuple[Dense | None, TopK | None, dict[str, Cascade]]:
    """FA3, and FlashInfer's top-k and cascades where a section asks for them; None for what cannot be loaded."""
    shape = Shape(args.heads, args.kv_heads, args.dim, DTYPES[args.dtype])
    fa3 = load("FA3", lambda: load_fa3(shape))
    wanted = set(args.sections) if args.flashinfer else set()
    top_k = load("FlashInfer top-k", lambda: load_flashinfer(device)) if "selection" in wanted else None
    return fa3, top_k, flashinfer_cascades(shape, args.cascades) if "grouped" in wanted else {}


def report(rows: Iterator[Row], machine: str, output: Path | None) -> list[Row]:
    """Give every row the machine line, append it to `output` at once, and collect all."""
    found = []
    for row in rows:
        found.append({**row, "machine": machine})
        if output:
            append_rows(output, COLUMNS, found[-1:])
        what = [row[c] for c in _NAMES if row[c] != ""]
        print(*what, row["error"] or f"{row['us']} us", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure; print tables, append rows to `--output`."""
    args = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times CUDA kernels, and torch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if args.output:
        require_columns(args.output, COLUMNS)
    bench = Bench(args, device, GraphTimer(args.replays), *load_baselines(args, device))
    machine = machine_line()
    rows = report(bench.rows(), machine, args.output)
    print(f"{machine}\n\n{markdown(rows)}")


if __name__ == "__main__":
    command.run(main)
