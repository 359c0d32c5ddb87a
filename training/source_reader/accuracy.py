"""Measure the source reader in decode, method by method: on held-out text and on chains.

    PYTHONPATH=.:kernels:training python -m source_reader.accuracy text models/source-reader --data .ckpt/data \\
        --methods full,window,lessismore,lessismore:scope=kv_head,tidaldecode --budgets 128,256,512,1024 \\
        --selection 2,5 --csv out/text.csv
    … accuracy chains models/source-reader --facts 256 --steps 32 … --csv out/chains.csv
    … accuracy text models/source-reader --search 2 --items 50 --methods lessismore --budgets 512 --csv out/search.csv

`text`: windows of 8,192 tokens behind `<bos>`; the last `--decoded` are decoded, each fed the right token, the others
are the prompt. `agreement`: share of steps whose argmax is that of full attention by the same operators. `distant`,
`near`, `fresh`: share of names (see `identifiers.py`, D = `--distance`) whose completion is right throughout.
`chains`: problems of one size; `whole`: every solution token right.
A `±` column is half of a 95% interval over the items. `attended`: share of their context that sparse layers read;
`attended_tokens`, `attended_fraction`: tokens a layer, and their share, over all layers; `recall`: share of the full
attention's weight, by head, that sets hold.
"""

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from small_qwen3.bench import Bench, ChainBench, Scores, add_flags, half_interval, methods_of, write
from small_qwen3.decode import Context, Decoded, prefill
from small_qwen3.model import Shape, SmallQwen3, load_checkpoint
from torch import Tensor

from sgl_lim.tasks.chains import make_chain

from .identifiers import KINDS, find_occurrences, token_bytes
from .model import CONTEXT, PUBLISHED
from .prepare import held_out_tokens
from .tokenizer import BOS, EOS, load_tokenizer


class TextBench:
    """Windows of held-out text, their prompts prefilled once for all methods."""

    fields = ("loss", "loss±", "perplexity", "agreement", "agreement±", *(n for k in KINDS for n in (k, f"{k}_names")))

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

    def summary(self, scores: Scores) -> dict[str, object]:
        """The row's figures from those of all windows."""
        row: dict[str, object] = {"perplexity": f"{math.exp(statistics.fmean(scores['loss'])):.4f}"}
        for name in ("loss", "agreement"):
            row |= {name: f"{statistics.fmean(scores[name]):.4f}", f"{name}±": f"{half_interval(scores[name]):.4f}"}
        for kind in KINDS:
            names = int(sum(scores[f"{kind}_names"]))
            share = sum(scores[f"{kind}_right"]) / names if names else math.nan
            row |= {kind: f"{share:.4f}", f"{kind}_names": names}
        return row


def chain_items(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Problems of one size as token ids."""
    tokenizer = load_tokenizer()
    items = []
    for index in range(args.items):
        problem = make_chain(random.Random(f"{args.seed}/{index}"), num_facts=args.facts, num_steps=args.steps)
        prompt = [BOS, *tokenizer.encode(problem.prompt, add_special_tokens=False).ids]
        solution = [*tokenizer.encode(f" {problem.solution}", add_special_tokens=False).ids, EOS]
        items.append((torch.tensor(prompt, device=args.device), torch.tensor(solution, device=args.device)))
    return items


def every_choice(layers: int, selections: int) -> list[tuple[int, ...]]:
    """Choices of selection layers behind a dense layer at least, with a sparse layer behind each."""
    choices = itertools.combinations(range(1, layers - 1), selections) if selections > 0 else ()
    return [c for c in choices if all(b - a > 1 for a, b in itertools.pairwise(c))]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with the `size` of an item."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "chains"))
    parser.add_argument("--search", type=int, metavar="N", help="every choice of N selection layers, not --selection")
    add_flags(parser, selection=(2, 5), budgets=(128, 256, 512, 1024))
    parser.add_argument("--data", type=Path, help="prepared data; held-out text is encoded anew without it")
    parser.add_argument("--length", type=int, default=CONTEXT)
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--distance", type=int, default=1024)
    parser.add_argument("--facts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args(arguments)
    if args.search is not None and not every_choice(PUBLISHED.layers, args.search):
        parser.error(f"--search {args.search}: no choice of so many layers leaves a sparse layer behind each")
    args.size = f"{args.facts}/{args.steps}" if args.what == "chains" else f"{args.length}/{args.decoded}"
    return args


def main(arguments: list[str] | None = None, shape: Shape = PUBLISHED) -> None:
    args = parse(arguments)
    model = SmallQwen3(shape).to(args.device, torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, args.folder)
    bench: Bench = ChainBench(model, chain_items(args)) if args.what == "chains" else TextBench(model, args)
    choices = None if args.search is None else every_choice(shape.layers, args.search)
    write(bench, list(methods_of(args, choices)), args)


if __name__ == "__main__":
    main()
