"""Kernels by themselves on one CUDA device: correctness first, then microseconds and GB/s, FA3's beside ours.

    python benchmarks/kernels.py --output out/kernels.csv
    python benchmarks/kernels.py --sections layer --cases 16x32768 --quick

Sections, on a model layer's shape (Qwen3-8B's by default):
- sparse_decode: attention over a budget of tokens; FA3 over the same slots.
- decode_with_scores: dense attention that also writes every head's logits; FA3's dense attention over the same slots.
- selection: logits to scores, scores to the chosen tokens' slots, for heads that agree and heads that do not;
  FlashInfer's top-k of the same scores where it can be compiled.
- layer: both in one graph, as in a selection layer, against FA3's dense layer. The target is a ratio of at most 1.2 at
  16x32768.

Before a kernel is timed, its output is compared with the float64 reference in at most four rows (`deviation`: relative
for attention, of log-weights for scores, the share of tokens that differ for sets); beyond the limit it has no time.
Times are of CUDA graphs whose calls rotate over keys and values that L2 cannot hold; slots are scattered. Selection
reads what attention has just written, and may find it in L2 as in a layer. `gb_per_s` counts keys and values once, and
`share_of_copy` is beside the best device copy of the same run. `ratio_to_fa3` is our time over FA3's: less is better.
A baseline that cannot be imported has no rows. Uses about 13 GiB of device memory by default.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from kernel_operands import (
    CACHES,
    COPIED_BYTES,
    SCORE_SLACK,
    Call,
    Dense,
    GraphTimer,
    Operands,
    Pool,
    Selection,
    Shape,
    TopK,
    checked_rows,
    decode_deviation,
    full_lens,
    head_logits,
    load_fa3,
    load_flashinfer,
    scattered_slots,
    score_deviation,
    set_deviation,
    slots_to_positions,
)
from machine import machine_line
from results_file import append_rows
from torch import Tensor

from lim_kernels import decode_with_scores, sparse_decode
from lim_kernels.select_tokens import AGGREGATES

Case = tuple[int, int]
Row = dict[str, Any]
SECTIONS = ("sparse_decode", "decode_with_scores", "selection", "layer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
"""Largest deviation of attention from the reference, by dtype."""
SHARES = (0.0, 0.7)
FLASHINFER_MOST = 2048
QUICK_REPLAYS = 3
COLUMNS = (
    *("section", "op", "implementation", "batch", "context", "tokens", "aggregate"),
    *("us", "p20", "p80", "gb_per_s", "share_of_copy", "ratio_to_fa3", "deviation", "error", "note", "machine"),
)


class Timer(Protocol):
    """What `GraphTimer` does, so that a test can do without a GPU."""

    def __call__(self, variants: list[Call]) -> list[float]: ...
    def copy(self) -> list[float]: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Measured:
    """Deviation from the reference and, if it may be trusted, microseconds a call."""

    deviation: float | None = None
    times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def us(self) -> float | None:
        """The median."""
        return percentiles(self.times)[1] if self.times else None


def percentiles(times: list[float]) -> list[float]:
    """20th, 50th and 80th, interpolated."""
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(times, dtype=torch.float64).quantile(ranks).tolist()


def make_row(
    measured: Measured, *, kv_bytes: int = 0, copy_gb_per_s: float = 0.0, fa3_us: float | None = None, **cells: Any
) -> Row:
    """A CSV row; `cells` fills further columns. A figure that a number is missing for stays blank."""
    row: Row = {**dict.fromkeys(COLUMNS, ""), **cells, "error": measured.error}
    if measured.deviation is not None:
        row["deviation"] = f"{measured.deviation:.2g}"
    if measured.times:
        p20, us, p80 = percentiles(measured.times)
        row.update(us=round(us, 2), p20=round(p20, 2), p80=round(p80, 2))
        if kv_bytes:
            row["gb_per_s"] = round(kv_bytes / us / 1e3, 1)
            if copy_gb_per_s:
                row["share_of_copy"] = round(kv_bytes / us / 1e3 / copy_gb_per_s, 3)
        if fa3_us:
            row["ratio_to_fa3"] = round(us / fa3_us, 3)
    return row


class Bench:
    """The sections, a case at a time; what several sections need is measured once."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        timer: Timer,
        fa3: Dense | None = None,
        top_k: TopK | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.shape = Shape(args.heads, args.kv_heads, args.dim, DTYPES[args.dtype])
        self.sizes = Selection(args.budget, recent=args.budget // 4, sinks=4)
        self.limit = LIMITS[self.shape.dtype]
        self.device, self.timer, self.fa3, self.top_k = device, timer, fa3, top_k
        self.implementation = "triton" if device.type == "cuda" else "reference"
        sets = [(batch, args.budget) for batch in args.batches]
        self.cases = {name: sets if name == "sparse_decode" else args.cases for name in args.sections}
        self.copied = Measured(times=timer.copy())
        self.copy_gb_per_s = 2 * COPIED_BYTES / min(self.copied.times) / 1e3
        drawn = {batch * tokens for cases in self.cases.values() for batch, tokens in cases}
        self.pool = Pool(self.shape, max(count * self.shape.slot_sets(count) for count in drawn), device)
        self.operands: dict[Case, Operands] = {}
        self.found: dict[tuple[str, Case], Measured] = {}

    def rows(self) -> Iterator[Row]:
        """Rows of the copy and of each section. What a case raises ends that case alone."""
        note = f"2 GiB, bytes read and written; shares are of the best, {self.copy_gb_per_s:.0f} GB/s"
        copied: dict[str, Any] = {"section": "copy", "op": "copy", "implementation": "torch", "note": note}
        yield make_row(self.copied, kv_bytes=2 * COPIED_BYTES, **copied)
        for section, cases in self.cases.items():
            for case in cases:
                try:
                    yield from getattr(self, f"{section}_rows")(case)
                except Exception as error:
                    cells = {"section": section, "op": section, "batch": case[0], "context": case[1]}
                    yield make_row(Measured(error=reason(error)), **cells)

    def sparse_decode_rows(self, case: Case) -> Iterator[Row]:
        """Attention over a chosen set; its tokens may be anywhere, so that there is no context."""
        fa3 = self.fa3_of(case)
        calls = self.operands_of(case).calls(sparse_decode, implementation=self.implementation)
        found = [(self.implementation, self.measure_decode(calls, case)), ("fa3", fa3)]
        for implementation, measured in found:
            if measured:
                cells = {"op": "sparse_decode", "implementation": implementation, "context": ""}
                yield self.decode_row("sparse_decode", case, measured, fa3, **cells)

    def decode_with_scores_rows(self, case: Case) -> Iterator[Row]:
        """Dense attention with logits."""
        fa3, ours = self.fa3_of(case), self.ours_of(case)
        cells = {"op": "decode_with_scores", "implementation": self.implementation}
        note = composed_note(fa3.us) if fa3 and fa3.us else ""
        yield self.decode_row("decode_with_scores", case, ours, fa3, **cells, note=note)
        if fa3:
            yield self.decode_row("decode_with_scores", case, fa3, fa3, op="dense decode", implementation="fa3")

    def layer_rows(self, case: Case) -> Iterator[Row]:
        """Attention with logits, scores and choice in one graph, as a selection layer runs them."""
        operands, fa3 = self.operands_of(case), self.fa3_of(case)
        for aggregate in AGGREGATES:
            options = {"selection": self.sizes, "aggregate": aggregate, "implementation": self.implementation}
            calls = operands.calls(selection_layer, **options)
            check = partial(layer_deviation, calls, operands, self.sizes, aggregate)
            yield self.decode_row(
                "layer",
                case,
                self.measure(calls, check, self.limit),
                fa3,
                op="decode_with_scores + score_tokens + choose_tokens",
                implementation=self.implementation,
                aggregate=aggregate,
                note="; ".join(self.within_budget(case)),
            )

    def selection_rows(self, case: Case) -> Iterator[Row]:
        """Scores and choice by themselves, on logits drawn for it."""
        ours = self.ours_of(case)
        for share in SHARES:
            drawn = [head_logits(case[0], self.shape.heads, case[1], share, self.device) for _ in range(CACHES)]
            heads = f"heads share {share:g} of their noise" if share else "heads are independent"
            for aggregate in AGGREGATES:
                for op, implementation, measured in self.select(drawn, aggregate):
                    notes = [heads, *self.within_budget(case)]
                    if measured.us and ours.us:
                        notes.append(f"{measured.us / ours.us:.3f} of decode_with_scores' time")
                    yield make_row(
                        measured,
                        section="selection",
                        op=op,
                        implementation=implementation,
                        batch=case[0],
                        context=case[1],
                        tokens=min(case[1], self.sizes.budget),
                        aggregate=aggregate,
                        note="; ".join(notes),
                    )

    def select(self, drawn: list[Tensor], aggregate: str) -> Iterator[tuple[str, str, Measured]]:
        """Operator, implementation and measurement of every step of one selection from logits [B, H, L]."""
        batch, _, length = drawn[0].shape
        lens, rows = full_lens(batch, length, self.device), checked_rows(batch)
        score, choose = partial(self.sizes.score, aggregate=aggregate), self.sizes.choose
        ours = {"implementation": self.implementation}
        scorers = [partial(score, logits, lens, logits.logsumexp(2), **ours) for logits in drawn]

        def check_scores() -> float:
            wanted = score(drawn[0][rows], lens[rows], drawn[0][rows].logsumexp(2), implementation="reference")
            return score_deviation(scorers[0]()[rows], wanted, lens[rows], self.sizes)

        measured = self.measure(scorers, check_scores, SCORE_SLACK)
        yield "score_tokens", self.implementation, measured
        if measured.error:
            return
        scores, slots = [scorer() for scorer in scorers], scattered_slots(batch, length, self.device)

        def check_set(chosen: Tensor, counts: Tensor) -> float:
            positions = slots_to_positions(chosen[rows], slots[rows])
            return set_deviation(positions, counts[rows], scores[0][rows], lens[rows], self.sizes)

        choosers = [partial(choose, each, lens, slots, **ours) for each in scores]
        measured = self.measure(choosers, lambda: check_set(*choosers[0]()), 0.0)
        yield "choose_tokens", self.implementation, measured
        budget = self.sizes.budget
        if self.top_k and budget <= FLASHINFER_MOST:
            # It knows no sinks and no window: they get the largest scores beforehand.
            forced = ~self.sizes.candidates(lens, length)
            top = [partial(self.top_k, each.masked_fill(forced, 1e30), slots, lens, budget) for each in scores]
            measured = self.measure(top, lambda: check_set(top[0](), lens.clamp(max=budget)), 0.0)
            yield "top-k", "flashinfer", measured

    def measure(self, calls: list[Any], check: Callable[[], float], limit: float) -> Measured:
        """Check, then time. Whatever is raised becomes the measurement's error: other kernels may still work."""
        try:
            deviation = check()
            self.timer.release()
            # Not `>`: a NaN must fail.
            if not deviation <= limit:
                return Measured(deviation, error="check failed")
            return Measured(deviation, self.timer(calls))
        except Exception as error:
            return Measured(error=reason(error))

    def measure_decode(self, calls: list[Any], case: Case) -> Measured:
        """Attention whose calls return out, lse and possibly logits."""
        return self.measure(calls, lambda: decode_deviation(self.operands_of(case), *calls[0]()), self.limit)

    def operands_of(self, case: Case) -> Operands:
        """The case's queries and slots, the same in all sections."""
        if case not in self.operands:
            self.operands[case] = self.pool.draw(*case)
        return self.operands[case]

    def fa3_of(self, case: Case) -> Measured | None:
        """FA3's attention; None without FA3."""
        if self.fa3 and ("fa3", case) not in self.found:
            try:
                calls = self.fa3(self.operands_of(case))
                self.found["fa3", case] = self.measure_decode(calls, case)
            except Exception as error:
                self.found["fa3", case] = Measured(error=reason(error))
        return self.found.get(("fa3", case))

    def ours_of(self, case: Case) -> Measured:
        """Our dense attention with logits."""
        if ("ours", case) not in self.found:
            calls = self.operands_of(case).calls(decode_with_scores, implementation=self.implementation)
            self.found["ours", case] = self.measure_decode(calls, case)
        return self.found["ours", case]

    def within_budget(self, case: Case) -> list[str]:
        """A note where no row is longer than the budget."""
        return ["within the budget: nothing to select"] if case[1] <= self.sizes.budget else []

    def decode_row(self, section: str, case: Case, measured: Measured, fa3: Measured | None, **cells: Any) -> Row:
        """A row of attention over all tokens of a case."""
        batch, tokens = case
        place = {"section": section, "batch": batch, "context": tokens, "tokens": tokens, **cells}
        kv_bytes, fa3_us = self.shape.kv_bytes(batch * tokens), fa3.us if fa3 else None
        return make_row(measured, kv_bytes=kv_bytes, copy_gb_per_s=self.copy_gb_per_s, fa3_us=fa3_us, **place)


def selection_layer(
    *operands: Tensor, scale: float, selection: Selection, aggregate: str, implementation: str
) -> tuple[Tensor, ...]:
    """What a selection layer does beside its projections: out, lse, logits, and the chosen slots with their counts."""
    *_, slots, lens = operands
    out, lse, logits = decode_with_scores(
        *operands, scale=scale, score_beyond=selection.budget, implementation=implementation
    )
    scores = selection.score(logits, lens, lse, aggregate=aggregate, implementation=implementation)
    return out, lse, logits, *selection.choose(scores, lens, slots, implementation=implementation)


def layer_deviation(calls: list[Any], operands: Operands, selection: Selection, aggregate: str) -> float:
    """Deviation of attention, or 1 if the set is not the reference's of the very logits that attention wrote."""
    out, lse, logits, chosen, counts = calls[0]()
    within = logits.shape[2] <= selection.budget
    deviation = decode_deviation(operands, out, lse, *(() if within else (logits,)))
    rows = checked_rows(len(out))
    lens = operands.lens[rows]
    scores = selection.score(logits[rows], lens, lse[rows], aggregate=aggregate, implementation="reference")
    positions = slots_to_positions(chosen[rows], operands.slots[0][rows])
    return 1.0 if set_deviation(positions, counts[rows], scores, lens, selection) else deviation


def composed_note(fa3_us: float) -> str:
    """What attention by FA3 and a separate pass over the keys, half of what FA3 reads, would take at least."""
    return f"FA3 then a pass over the keys: at least {1.5 * fa3_us:.1f} us (derived as 1.5 x FA3, not measured)"


def reason(error: Exception) -> str:
    """A line for the column `error`; the traceback goes to the log."""
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


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
    parser.add_argument("--replays", type=positive, default=11, help="of every graph; a figure is their median")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPLAYS} replays: for a look, not for a report")
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


def report(rows: Iterator[Row], machine: str, output: Path | None) -> list[Row]:
    """Give every row the machine line, append it to `output` at once, and collect all."""
    found = []
    for row in rows:
        found.append({**row, "machine": machine})
        if output:
            append_rows(output, COLUMNS, found[-1:])
        what = [row[c] for c in ("section", "op", "implementation", "batch", "context", "aggregate") if row[c] != ""]
        print(*what, row["error"] or f"{row['us']} us", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure; print tables, append rows to `--output`."""
    args = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times CUDA kernels, and torch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(args.heads, args.kv_heads, args.dim, DTYPES[args.dtype])
    fa3 = load("FA3", lambda: load_fa3(shape))
    top_k = load("FlashInfer top-k", lambda: load_flashinfer(device)) if "selection" in args.sections else None
    bench = Bench(args, device, GraphTimer(args.replays), fa3, top_k)
    machine = machine_line()
    rows = report(bench.rows(), machine, args.output)
    print(f"{machine}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
