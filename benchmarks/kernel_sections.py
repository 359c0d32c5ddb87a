"""The sections of `kernels.py`: what is checked against the reference, then timed, and the CSV rows of it."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.failures import reason
from benchmarks.forest import Forest
from benchmarks.kernel_forests import Cascade, attend_in_groups, draw_forest, groups_deviation, stored_tokens
from benchmarks.kernel_layers import ATTENDS, SelectionLayer
from benchmarks.kernel_operands import (
    CACHES,
    COPIED_BYTES,
    SCORE_SLACK,
    Call,
    Dense,
    Operands,
    Pool,
    Selection,
    Shape,
    TopK,
    attend_and_score,
    checked_rows,
    decode_deviation,
    full_lens,
    head_logits,
    scattered_slots,
    score_alone,
    score_deviation,
    scores_deviation,
    set_deviation,
    slots_to_positions,
)
from lim_kernels import find_prefix_groups, sparse_decode
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.select_tokens import AGGREGATES

Case = tuple[int, int]
Row = dict[str, Any]
SECTIONS = ("sparse_decode", "decode_with_scores", "score_context", "selection", "layer", "grouped")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
"""Largest deviation of attention from the reference, by dtype."""
SHARES = (0.0, 0.7)
GROUPED_AGGREGATES = ("max", "union")
FLASHINFER_MOST = 2048
COLUMNS = (
    *("section", "op", "implementation", "batch", "context", "prefixes", "tokens", "aggregate"),
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


def guarded(measure: Callable[[], Iterator[Row]], **cells: Any) -> Iterator[Row]:
    """The rows of a case; what it raises ends this case alone, as a row of its own."""
    try:
        yield from measure()
    except Exception as error:
        yield make_row(Measured(error=reason(error)), **cells)


class Bench:
    """The sections, a case at a time; what several sections need is measured once."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        timer: Timer,
        fa3: Dense | None = None,
        top_k: TopK | None = None,
        cascades: Mapping[str, Cascade] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.shape = Shape(args.heads, args.kv_heads, args.dim, DTYPES[args.dtype])
        self.sizes = Selection(args.budget, recent=args.budget // 4, sinks=4)
        self.limit = LIMITS[self.shape.dtype]
        self.device, self.timer, self.fa3, self.top_k = device, timer, fa3, top_k
        self.cascades, self.granule = cascades or {}, args.granule
        self.implementation = "triton" if device.type == "cuda" else "reference"
        sets = [(batch, args.budget) for batch in args.batches]
        sections = [name for name in args.sections if name != "grouped"]
        self.cases = {name: sets if name == "sparse_decode" else args.cases for name in sections}
        self.forests: list[Forest] = args.forests if "grouped" in args.sections else []
        self.copied = Measured(times=timer.copy())
        self.copy_gb_per_s = 2 * COPIED_BYTES / min(self.copied.times) / 1e3
        drawn = {batch * tokens for cases in self.cases.values() for batch, tokens in cases}
        drawn |= set(map(stored_tokens, self.forests))
        self.pool = Pool(self.shape, max(count * self.shape.slot_sets(count) for count in drawn), device)
        self.operands: dict[Case, Operands] = {}
        self.found: dict[tuple[str, Case], Measured] = {}

    def rows(self) -> Iterator[Row]:
        """Rows of the copy and of each section. What a case raises ends that case alone."""
        note = f"2 GiB, bytes read and written; shares are of the best, {self.copy_gb_per_s:.0f} GB/s"
        copied: dict[str, Any] = {"section": "copy", "op": "copy", "implementation": "torch", "note": note}
        yield make_row(self.copied, kv_bytes=2 * COPIED_BYTES, **copied)
        for section, cases in self.cases.items():
            for batch, context in cases:
                measure = partial(getattr(self, f"{section}_rows"), (batch, context))
                yield from guarded(measure, section=section, op=section, batch=batch, context=context)
        for forest in self.forests:
            cells = {"batch": forest.batch, "context": forest.context, "prefixes": forest.prefixes}
            yield from guarded(partial(self.grouped_rows, forest), section="grouped", op="grouped", **cells)

    def sparse_decode_rows(self, case: Case) -> Iterator[Row]:
        """Attention over a chosen set; its tokens may be anywhere, so that there is no context."""
        fa3 = self.fa3_of(case)
        calls = self.operands_of(case).calls(sparse_decode, implementation=self.implementation)
        found = [(self.implementation, self.measure_decode(calls, self.operands_of(case))), ("fa3", fa3)]
        for implementation, measured in found:
            if measured:
                cells: dict[str, Any] = {"op": "sparse_decode", "implementation": implementation, "context": ""}
                yield self.decode_row("sparse_decode", case, measured, fa3, **cells)

    def decode_with_scores_rows(self, case: Case) -> Iterator[Row]:
        """Dense attention with logits."""
        fa3, ours = self.fa3_of(case), self.ours_of(case)
        cells: dict[str, Any] = {"op": "decode_with_scores", "implementation": self.implementation}
        note = composed_note(fa3.us) if fa3 and fa3.us else ""
        yield self.decode_row("decode_with_scores", case, ours, fa3, **cells, note=note)
        if fa3:
            yield self.decode_row("decode_with_scores", case, fa3, fa3, op="dense decode", implementation="fa3")

    def score_context_rows(self, case: Case) -> Iterator[Row]:
        """Logits from keys alone, which bandwidth counts alone."""
        operands = self.operands_of(case)
        calls: list[Any] = operands.calls(score_alone, implementation=self.implementation)
        measured = self.measure(calls, lambda: scores_deviation(operands, *calls[0]()), self.limit)
        cells: dict[str, Any] = {"op": "score_context", "implementation": self.implementation}
        key_bytes = self.shape.kv_bytes(case[0] * case[1]) // 2
        yield self.decode_row("score_context", case, measured, self.fa3_of(case), key_bytes, **cells)

    def layer_rows(self, case: Case) -> Iterator[Row]:
        """Scoring, choice and attention in one graph, as selection layers run them that attend to either."""
        fa3, note = self.fa3_of(case), "; ".join(self.within_budget(case))
        for attends in ATTENDS:
            for aggregate in AGGREGATES:
                layer = SelectionLayer(self.sizes, aggregate, attends, self.implementation)
                yield self.layer_row("layer", case, layer, self.operands_of(case), fa3, note=note)

    def layer_row(
        self,
        section: str,
        case: Case,
        layer: SelectionLayer,
        operands: Operands,
        fa3: Measured | None,
        stored: int = 0,
        **cells: Any,
    ) -> Row:
        """A whole selection layer; `stored` as in `grouped_rows`."""
        calls: list[Any] = operands.calls(layer)
        measured = self.measure(calls, lambda: layer.deviation(operands, calls[0]()), self.limit)
        kv_bytes = layer.kv_bytes(self.shape, *case, stored or case[0] * case[1])
        of = {"op": layer.op, "implementation": self.implementation, "aggregate": layer.aggregate}
        return self.decode_row(section, case, measured, fa3, kv_bytes, **of, **cells)

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

    def grouped_rows(self, forest: Forest) -> Iterator[Row]:
        """Attention of a forest's rows, by what reads a shared prefix once, and by what reads it for every row."""
        operands, case, stored = draw_forest(self.pool, forest), (forest.batch, forest.context), stored_tokens(forest)
        kv_bytes = self.shape.kv_bytes(stored)
        ours: dict[str, Any] = {"implementation": self.implementation}
        cells: dict[str, Any] = {"prefixes": forest.prefixes, "batch": case[0], "context": case[1]}
        note = f"{stored} tokens stored, {forest.batch * forest.context} attended"
        fa3 = self.measure_baseline(partial(self.fa3, operands), operands) if self.fa3 else None

        finders = [
            partial(find_prefix_groups, slots, operands.lens, granule=self.granule, **ours) for slots in operands.slots
        ]
        groups = finders[0]()
        wanted = finders[0](implementation="reference")
        finding = self.measure(finders, lambda: groups_deviation(groups, wanted), 0.0)
        yield make_row(
            finding, section="grouped", op="find_prefix_groups", note="once a step for all layers", **cells, **ours
        )

        read = forest.batch * forest.context - int(groups.already_read.sum())
        kernels = {
            "grouped_decode": (operands.calls(attend_in_groups, groups=groups, **ours), f"{note}; {read} read"),
            "sparse_decode over all slots": (operands.calls(sparse_decode, **ours), note),
        }
        for op, (calls, said) in kernels.items():
            measured = self.measure_decode(calls, operands)
            yield self.decode_row("grouped", case, measured, fa3, kv_bytes, op=op, note=said, **ours, **cells)
        if fa3:
            how: dict[str, Any] = {"op": "dense decode", "implementation": "fa3", "note": note}
            yield self.decode_row("grouped", case, fa3, fa3, kv_bytes, **how, **cells)
        for name, cascade in self.cascades.items():
            measured = self.measure_baseline(partial(cascade, operands, forest), operands)
            how = {"op": "cascade", "implementation": name, "note": note}
            yield self.decode_row("grouped", case, measured, fa3, kv_bytes, **how, **cells)
        yield from self.grouped_selection_rows(forest, operands, groups, fa3)

    def grouped_selection_rows(
        self, forest: Forest, operands: Operands, groups: PrefixGroups, fa3: Measured | None
    ) -> Iterator[Row]:
        """Logits from the keys of a forest's rows, and whole selection layers that choose for each row by itself."""
        case, stored = (forest.batch, forest.context), stored_tokens(forest)
        cells: dict[str, Any] = {"prefixes": forest.prefixes}
        calls: list[Any] = operands.calls(score_alone, groups=groups, implementation=self.implementation)
        measured = self.measure(calls, lambda: scores_deviation(operands, *calls[0]()), self.limit)
        of = {"op": "score_context", "implementation": self.implementation}
        yield self.decode_row("grouped", case, measured, fa3, self.shape.kv_bytes(stored) // 2, **of, **cells)
        for attends in ATTENDS:
            for aggregate in GROUPED_AGGREGATES:
                layer = SelectionLayer(self.sizes, aggregate, attends, self.implementation, groups)
                yield self.layer_row("grouped", case, layer, operands, fa3, stored, **cells)

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

    def measure_decode(self, calls: list[Any], operands: Operands) -> Measured:
        """Attention whose calls return out, lse and possibly logits."""
        return self.measure(calls, lambda: decode_deviation(operands, *calls[0]()), self.limit)

    def measure_baseline(self, prepare: Callable[[], list[Any]], operands: Operands) -> Measured:
        """Attention by calls that are yet to be prepared, which may fail as well."""
        try:
            return self.measure_decode(prepare(), operands)
        except Exception as error:
            return Measured(error=reason(error))

    def operands_of(self, case: Case) -> Operands:
        """The case's queries and slots, the same in all sections."""
        if case not in self.operands:
            self.operands[case] = self.pool.draw(*case)
        return self.operands[case]

    def fa3_of(self, case: Case) -> Measured | None:
        """FA3's attention; None without FA3."""
        if self.fa3 and ("fa3", case) not in self.found:
            operands = self.operands_of(case)
            self.found["fa3", case] = self.measure_baseline(partial(self.fa3, operands), operands)
        return self.found.get(("fa3", case))

    def ours_of(self, case: Case) -> Measured:
        """Our dense attention with logits."""
        if ("ours", case) not in self.found:
            calls = self.operands_of(case).calls(attend_and_score, implementation=self.implementation)
            self.found["ours", case] = self.measure_decode(calls, self.operands_of(case))
        return self.found["ours", case]

    def within_budget(self, case: Case) -> list[str]:
        """A note where no row is longer than the budget."""
        return ["within the budget: nothing to select"] if case[1] <= self.sizes.budget else []

    def decode_row(
        self, section: str, case: Case, measured: Measured, fa3: Measured | None, kv_bytes: int = 0, **cells: Any
    ) -> Row:
        """A row of attention over all tokens of a case; `kv_bytes` where it reads others than all keys and values."""
        batch, tokens = case
        place = {"section": section, "batch": batch, "context": tokens, "tokens": tokens, **cells}
        fa3_us, kv_bytes = fa3.us if fa3 else None, kv_bytes or self.shape.kv_bytes(batch * tokens)
        return make_row(measured, kv_bytes=kv_bytes, copy_gb_per_s=self.copy_gb_per_s, fa3_us=fa3_us, **place)


def composed_note(fa3_us: float) -> str:
    """What attention by FA3 and a separate pass over the keys, half of what FA3 reads, would take at least."""
    return f"FA3 then a pass over the keys: at least {1.5 * fa3_us:.1f} us (derived as 1.5 x FA3, not measured)"
