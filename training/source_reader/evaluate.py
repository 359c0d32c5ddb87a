"""Measure the source reader in decode, method by method: on held-out text and on chains.

    PYTHONPATH=.:kernels:training python -m source_reader.evaluate text models/source-reader --data .ckpt/data \\
        --methods full,window,lessismore,lessismore:scope=kv_head,tidaldecode --budgets 128,256,512,1024 \\
        --selection 2,6 --csv out/text.csv
    … evaluate chains models/source-reader --facts 256 --steps 32 … --csv out/chains.csv
    … evaluate search models/source-reader --data .ckpt/data --items 24 --budgets 512 --csv out/search.csv

`text`: windows of 8,192 tokens behind `<bos>`; the last `--decoded` are decoded, each fed the right token, the others
are the prompt. `agreement`: share of steps whose argmax is that of full attention by the same operators. `distant`,
`near`, `fresh`: share of names (see `identifiers.py`, D = `--distance`) whose completion is right throughout. `search`:
the same with every pair of selection layers. `chains`: problems of one size; `whole`: every solution token right.
A `±` column is half of a 95% interval over the items. `attended`: share of their context that sparse layers read;
`recall`: share of the full attention's weight, by head, that their sets hold.
"""

import argparse
import csv
import hashlib
import math
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from small_qwen3.decode import Context, Decoded, decode, prefill
from small_qwen3.model import Shape, SmallQwen3, load_checkpoint
from torch import Tensor

from sgl_lim.methods import METHODS, Method
from sgl_lim.tasks.chains import make_chain

from .identifiers import KINDS, find_occurrences, token_bytes
from .model import CONTEXT, PUBLISHED
from .prepare import held_out_tokens
from .tokenizer import BOS, EOS, load_tokenizer

ASKED = ("what", "method", "budget", "selection_layers", "recency", "aggregate", "items", "decoded", "size", "seed")
TEXT = ("loss", "loss±", "perplexity", "agreement", "agreement±", *(n for k in KINDS for n in (k, f"{k}_names")))
CHAINS = ("whole", "whole±", "tokens")
COMMON = ("attended", "recall", "seconds", "weights_sha256", "device", "torch", "commit")


def build_method(spec: str, budget: int, selection: tuple[int, ...], recency: float) -> Method:
    """A method from `name` or `name:parameter=value:…`; parameters are those of its dataclass.

    Raises:
        ValueError: there is no method of that name.
    """
    name, *settings = spec.split(":")
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    kind = METHODS[name]
    given: dict[str, object] = {"recency": recency, "sinks": 4, "aggregate": "union", "scope": kind.scopes[0]}
    for setting in settings:
        parameter, _, value = setting.partition("=")
        given[parameter] = _value(value)
    return kind(budget=budget, selection_layers=selection, **given)  # type: ignore[arg-type]


def _value(text: str) -> object:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def settings(args: argparse.Namespace, layers: int) -> Iterator[tuple[str, Method]]:
    """Every method with every budget and choice of selection layers; full attention first, which others agree with."""
    yield "full", build_method("full", 1, args.selection, args.recency)
    pairs: Sequence[tuple[int, ...]] = [args.selection]
    if args.what == "search":
        pairs = [(a, b) for a in range(2, layers - 2) for b in range(a + 2, layers - 1)]
    for spec in args.methods.split(","):
        if spec != "full":
            for pair in pairs:
                yield from ((spec, build_method(spec, b, pair, args.recency)) for b in args.budgets)


class TextBench:
    """Windows of held-out text, their prompts prefilled once for all methods."""

    fields = TEXT

    def __init__(self, model: SmallQwen3, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        device = model.embed.device
        text = torch.from_numpy(held_out_tokens(args.data).astype(np.int64))
        starts = torch.linspace(0, len(text) - args.length, args.items).long()
        if args.items > 1 and starts.diff().min() < args.decoded:
            raise ValueError(f"{args.items} windows of {args.decoded} decoded tokens overlap in {len(text)} tokens")
        pieces = token_bytes(load_tokenizer())
        self.items: list[tuple[Tensor, Tensor, list]] = []
        for start in starts.tolist():
            targets = text[start : start + args.length]
            tokens = torch.cat((torch.tensor([BOS]), targets[:-1]))
            names = find_occurrences([pieces[t] for t in targets.tolist()], distance=args.distance)
            first = args.length - args.decoded
            self.items.append((tokens.to(device), targets.to(device), [n for n in names if n.first >= first]))
        self._dense: list[Tensor] = []

    def contexts(self) -> Iterator[tuple[int, Context, Tensor]]:
        prompt = self.args.length - self.args.decoded
        for index, (tokens, _, _) in enumerate(self.items):
            yield index, prefill(self.model, tokens[:prompt]), tokens[prompt:]

    def score(self, index: int, _: Context, found: Decoded) -> dict[str, float]:
        """Sums and means of one window."""
        _, targets, names = self.items[index]
        best = found.logits.argmax(-1)
        if index == len(self._dense):
            self._dense.append(best)
        right = (best == targets[-self.args.decoded :]).tolist()
        first = self.args.length - self.args.decoded
        scores = {
            "loss": F.cross_entropy(found.logits, targets[-self.args.decoded :]).item(),
            "agreement": (best == self._dense[index]).float().mean().item(),
        }
        for kind in KINDS:
            of_kind = [all(right[t - first] for t in n.completion) for n in names if n.kind == kind]
            scores |= {f"{kind}_right": sum(of_kind), f"{kind}_names": len(of_kind)}
        return scores

    def summary(self, scores: dict[str, list[float]]) -> dict[str, object]:
        """The row's figures from those of all windows."""
        row: dict[str, object] = {"perplexity": f"{math.exp(_mean(scores['loss'])):.4f}"}
        for name in ("loss", "agreement"):
            row |= {name: f"{_mean(scores[name]):.4f}", f"{name}±": f"{half_interval(scores[name]):.4f}"}
        for kind in KINDS:
            names = int(sum(scores[f"{kind}_names"]))
            share = sum(scores[f"{kind}_right"]) / names if names else math.nan
            row |= {kind: f"{share:.4f}", f"{kind}_names": names}
        return row


class ChainBench:
    """Problems of one size."""

    fields = CHAINS

    def __init__(self, model: SmallQwen3, args: argparse.Namespace) -> None:
        self.model = model
        tokenizer, device = load_tokenizer(), model.embed.device
        self.items = []
        for index in range(args.items):
            rng = random.Random(f"{args.seed}/{index}")
            problem = make_chain(rng, num_facts=args.facts, num_steps=args.steps)
            prompt = [BOS, *tokenizer.encode(problem.prompt, add_special_tokens=False).ids]
            solution = [*tokenizer.encode(f" {problem.solution}", add_special_tokens=False).ids, EOS]
            self.items.append([torch.tensor(t, device=device) for t in (prompt, solution)])

    def contexts(self) -> Iterator[tuple[int, Context, Tensor]]:
        for index, (prompt, solution) in enumerate(self.items):
            yield index, prefill(self.model, prompt), solution[:-1]

    def score(self, index: int, context: Context, found: Decoded) -> dict[str, float]:
        """Whether one chain is right, and which share of its tokens."""
        logits = torch.cat((self.model.logits(context.last), found.logits))
        right = logits.argmax(-1) == self.items[index][1]
        return {"whole": float(right.all()), "tokens": right.float().mean().item()}

    def summary(self, scores: dict[str, list[float]]) -> dict[str, object]:
        """The row's figures from those of all chains."""
        whole = {"whole": f"{_mean(scores['whole']):.4f}", "whole±": f"{half_interval(scores['whole']):.4f}"}
        return {**whole, "tokens": f"{_mean(scores['tokens']):.5f}"}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of a 95% interval of the mean, from the values' spread."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return 1.96 * math.sqrt(variance / len(values))


def measure(
    bench: TextBench | ChainBench, methods: list[tuple[str, Method]], args: argparse.Namespace
) -> Iterator[dict]:
    """Rows in the methods' order: every item's prompt is prefilled once, then decoded under each method."""
    scores: list[dict[str, list[float]]] = [defaultdict(list) for _ in methods]
    seconds = [0.0] * len(methods)
    for index, context, fed in bench.contexts():
        for place, (_, method) in enumerate(methods):
            begin = time.monotonic()
            found = decode(bench.model, context, fed, method, rows=args.rows, recall=args.recall)
            one = bench.score(index, context, found)
            one["attended"] = found.attended.mean().item()
            one["recall"] = math.nan if found.recall is None else found.recall.mean().item()
            for name, value in one.items():
                scores[place][name].append(value)
            seconds[place] += time.monotonic() - begin
    for (spec, method), found_scores, taken in zip(methods, scores, seconds, strict=True):
        common = {name: f"{_mean(found_scores[name]):.4f}" for name in ("attended", "recall")}
        yield {**_asked(spec, method, args), **bench.summary(found_scores), **common, "seconds": f"{taken:.1f}"}


def _asked(spec: str, method: Method, args: argparse.Namespace) -> dict[str, object]:
    size = f"{args.facts}/{args.steps}" if args.what == "chains" else args.length
    row = {"what": args.what, "method": spec, "items": args.items, "size": size, "seed": args.seed}
    row["decoded"] = args.decoded if args.what != "chains" else ""
    if spec != "full":
        layers = "-".join(map(str, method.selection_layers))
        row |= {"budget": method.budget, "selection_layers": layers}
        row |= {"recency": method.recency, "aggregate": method.aggregate}
    return row


def machine(folder: Path, device: str, commit: str) -> dict[str, str]:
    """What every row says of where it was measured."""
    weights = b"".join(f.read_bytes() for f in sorted(folder.glob("*.safetensors")))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return dict(
        zip(COMMON[3:], (hashlib.sha256(weights).hexdigest()[:12], name, torch.__version__, commit), strict=True)
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "none"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "chains", "search"))
    parser.add_argument("folder", type=Path, help="published model")
    parser.add_argument("--data", type=Path, help="prepared data; held-out text is encoded anew without it")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument(
        "--methods", default="lessismore,window", help="specs of `build_method`, by commas; full is added"
    )
    parser.add_argument("--budgets", type=numbers, default=(128, 256, 512, 1024))
    parser.add_argument("--selection", type=numbers, default=(2, 6))
    parser.add_argument("--recency", type=float, default=0.25)
    parser.add_argument("--items", type=int, default=200, help="windows or chains")
    parser.add_argument("--length", type=int, default=CONTEXT)
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--distance", type=int, default=1024)
    parser.add_argument("--facts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--recall", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", type=int, default=256, help="decode steps at once")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--commit", default=commit, help="for a host without the repository's history")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, shape: Shape = PUBLISHED) -> None:
    args = parse(arguments)
    model = SmallQwen3(shape).to(args.device, torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, args.folder)
    bench: TextBench | ChainBench = (ChainBench if args.what == "chains" else TextBench)(model, args)
    where = machine(args.folder, args.device, args.commit)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*ASKED, *bench.fields, *COMMON), lineterminator="\n")
        writer.writeheader()
        for row in measure(bench, list(settings(args, shape.layers)), args):
            writer.writerow({**row, **where})
            print(*(f"{name}={row[name]}" for name in row if name not in ("what", "items", "seed")), flush=True)


if __name__ == "__main__":
    main()
