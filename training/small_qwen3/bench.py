"""Measures a small model in decode, method by method: what benches of a model's tasks share, and that of chains."""

import argparse
import csv
import hashlib
import math
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sgl_lim.evaluate.choices import method_of
from sgl_lim.methods import METHODS, Full, Method
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.programs.intervals import wilson_interval

from .decode import Context, Decoded, decode, prefill
from .model import SmallQwen3

ASKED = ("what", "method", "budget", "selection_layers", "recency", "aggregate", "items", "size", "seed")
CHAINS = ("whole", "whole_low", "whole_high", "tokens")
COMMON = ("attended", "attended_fraction", "attended_tokens", "recall", "seconds")
WHERE = ("weights_sha256", "device", "torch", "commit")

Scores = Mapping[str, Sequence[float]]


class Bench(Protocol):
    """A model and the items of one task."""

    model: SmallQwen3
    fields: tuple[str, ...]
    """Columns of `summary`."""

    def contexts(self) -> Iterator[tuple[int, Context, Tensor]]:
        """Each item's index, its prefilled prompt, and the token ids [S] that are fed behind it."""
        ...

    def score(self, index: int, context: Context, found: Decoded) -> dict[str, float]:
        """Figures of one item under one method; full attention is the first."""
        ...

    def summary(self, scores: Scores) -> dict[str, object]:
        """The row's figures from those of all items."""
        ...


class ChainBench:
    """Chain-tracing problems as token ids: prompts [P], and solutions [S] up to the end of the text."""

    fields = CHAINS

    def __init__(self, model: SmallQwen3, items: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.model, self.items = model, items

    def contexts(self) -> Iterator[tuple[int, Context, Tensor]]:
        for index, (prompt, solution) in enumerate(self.items):
            yield index, prefill(self.model, prompt), solution[:-1]

    def score(self, index: int, context: Context, found: Decoded) -> dict[str, float]:
        """Whether one chain is right, and which share of its tokens.

        All argmaxes right behind the right tokens is the same as greedy generation that is right throughout.
        """
        logits = torch.cat((self.model.logits(context.last), found.logits))
        right = logits.argmax(-1) == self.items[index][1]
        return {"whole": float(right.all()), "tokens": right.float().mean().item()}

    def summary(self, scores: Scores) -> dict[str, object]:
        """Share of chains that are right with its 95% interval (Wilson's), and of tokens."""
        whole = statistics.fmean(scores["whole"])
        interval = wilson_interval(whole, len(scores["whole"]))
        assert interval is not None
        rates = {"whole": whole, "whole_low": interval[0], "whole_high": interval[1]}
        tokens = statistics.fmean(scores["tokens"])
        return {**{name: f"{rate:.4f}" for name, rate in rates.items()}, "tokens": f"{tokens:.5f}"}


def half_interval(values: Sequence[float]) -> float:
    """Half the width of a 95% interval of the mean, from the values' spread."""
    if len(values) < 2:
        return math.nan
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def methods_of(
    args: argparse.Namespace, selections: Sequence[tuple[int, ...]] | None = None
) -> Iterator[tuple[str, Method]]:
    """Every method with every budget and choice of selection layers; full attention first."""
    yield "full", Full()
    for spec in args.methods.split(","):
        if spec != "full":
            choices = [args.selection] if selections is None else selections
            kind = METHODS.get(spec.partition(":")[0])
            if kind is not None and "selection_layers" not in parameters_of(kind):
                choices = choices[:1]
            for layers in choices:
                yield from ((spec, method_of(spec, b, layers, args.recency)) for b in args.budgets)


def measure(bench: Bench, methods: Sequence[tuple[str, Method]], args: argparse.Namespace) -> Iterator[dict]:
    """A row a method: every item's prompt is prefilled once, then decoded under each.

    Args:
        args: with what `add_flags` adds, `what` and `size`.
    """
    scores: list[dict[str, list[float]]] = [defaultdict(list) for _ in methods]
    seconds = [0.0] * len(methods)
    for index, context, fed in bench.contexts():
        dense = context.length + 1 + (len(fed) - 1) / 2
        for place, (_, method) in enumerate(methods):
            begin = time.monotonic()
            found = decode(bench.model, context, fed, method, rows=args.rows, recall=args.recall)
            one = bench.score(index, context, found)
            one["attended"] = found.attended.mean().item()
            one["attended_tokens"] = found.read.mean().item()
            one["attended_fraction"] = one["attended_tokens"] / dense
            one["recall"] = math.nan if found.recall is None else found.recall.mean().item()
            for name, value in one.items():
                scores[place][name].append(value)
            seconds[place] += time.monotonic() - begin
    for (spec, method), found_scores, taken in zip(methods, scores, seconds, strict=True):
        common = {name: f"{statistics.fmean(found_scores[name]):.4f}" for name in COMMON[:-1]}
        yield {**_asked(spec, method, args), **bench.summary(found_scores), **common, "seconds": f"{taken:.1f}"}


def _asked(spec: str, method: Method, args: argparse.Namespace) -> dict[str, object]:
    row = {"what": args.what, "method": spec, "items": args.items, "size": args.size, "seed": args.seed}
    if spec != "full":
        settings = method.settings()
        layers = "-".join(map(str, settings.get("selection_layers", ())))
        row |= {"budget": method.budget, "selection_layers": layers}
        row |= {name: settings[name] for name in ("recency", "aggregate") if name in settings}
    return row


def numbers(text: str) -> tuple[int, ...]:
    """`2,8` as (2, 8)."""
    return tuple(map(int, text.split(",")))


def add_flags(parser: argparse.ArgumentParser, *, selection: tuple[int, ...], budgets: tuple[int, ...]) -> None:
    """The model's folder, the CSV, methods and budgets, and where it runs; with the defaults of a model."""
    parser.add_argument("folder", type=Path, help="published model")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--methods", default="lessismore,window", help="specs of `method_of`, by commas; full is added")
    parser.add_argument("--budgets", type=numbers, default=budgets)
    parser.add_argument("--selection", type=numbers, default=selection)
    parser.add_argument("--recency", type=float, default=0.25)
    parser.add_argument("--items", type=int, default=200, help="chains, or windows of text")
    parser.add_argument("--recall", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", type=int, default=256, help="decode steps at once")
    parser.add_argument("--seed", type=int, default=1000)
    add_host_flags(parser)


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """What `where` asks of the command line, beside the folder."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "none"
    parser.add_argument("--commit", default=commit, help="for a host without the repository's history")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def where(args: argparse.Namespace) -> dict[str, str]:
    """What every row says of where it was measured: `WHERE`."""
    weights = b"".join(f.read_bytes() for f in sorted(args.folder.glob("*.safetensors")))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    return dict(
        zip(WHERE, (hashlib.sha256(weights).hexdigest()[:12], name, torch.__version__, args.commit), strict=True)
    )


def write(bench: Bench, methods: Sequence[tuple[str, Method]], args: argparse.Namespace) -> None:
    """Measure; write the CSV and print its rows.

    Raises:
        SystemExit: the model has fewer layers than a method would select at.
    """
    depth = bench.model.shape.layers
    for spec, method in methods:
        layers = method.settings().get("selection_layers", ())
        if max(layers, default=0) >= depth:
            raise SystemExit(f"--selection: {spec} would select at {','.join(map(str, layers))} of {depth} layers")
    machine = where(args)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*ASKED, *bench.fields, *COMMON, *WHERE), lineterminator="\n")
        writer.writeheader()
        for row in measure(bench, methods, args):
            writer.writerow({**row, **machine})
            print(*(f"{name}={row[name]}" for name in row if name not in ("what", "items", "seed")), flush=True)
