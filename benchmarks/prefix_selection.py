"""What choosing the tokens of a shared prefix together costs: right chains, and overlap with each row's own sets.

    PYTHONPATH=training python -m benchmarks.prefix_selection --output out/prefix_selection.csv

Siblings are chains of one context: the chain tracer's shuffled facts are the prefix that they share, and each asks for
another chain through them, so each needs another fact at every step. All contexts' siblings decode together, a row
each, by `sgl_lim.serving.layer` as in a server. They are fed the right words, so that methods are compared on the same
steps;
all words of a chain right is the same event as a greedy generation of the whole chain.

Columns: `whole_chains`, `words`: shares that the model gets right. For `group`, beside the sets that the rows would
have chosen for themselves from the same scores: `overlap`, the share of those that is in the group's, `overlap_ranked`,
without sinks and window, which are in both. `set_tokens`: tokens in a row's set; `read_once`: the share of all rows'
set tokens that a sparse layer does not read again.
"""

import argparse
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from chain_tracer.decode import Prefilled, encode, prefill
from chain_tracer.model import ChainTracer, finish, load_checkpoint, project, rope_table
from torch import Tensor

from benchmarks.machine import machine_line
from benchmarks.results_file import append_rows, require_columns
from lim_kernels import Scaling
from sgl_lim import command
from sgl_lim.methods import Full, HeadsOfRank, LessIsMore, Method, SharedSets
from sgl_lim.programs.argument_types import integer
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Plan, plan_reads
from sgl_lim.serving.state import GRANULE
from sgl_lim.tasks.chains import MAX_STEPS, MODULUS, NUM_NODES, ChainProblem, make_chain

_ASKED = (
    "prefix_selection",
    "budget",
    "aggregate",
    "selection_layers",
    "siblings",
    "contexts",
    "facts",
    "steps",
    "seed",
)
_FOUND = ("whole_chains", "words", "overlap", "overlap_ranked", "set_tokens", "read_once", "seconds")
COLUMNS = (*_ASKED, *_FOUND, "machine")
RECENCY, SINKS = 0.25, 4
_FACT = re.compile(r"v(\d+) -> v(\d+) \+ (\d+) ;")


@dataclass(frozen=True)
class Compared(LessIsMore):
    """The method, which also notes how its sets overlap with those of rows that choose for themselves."""

    overlaps: list[Tensor] = field(default_factory=list)
    """Of each selection float32 [2, B]: the overlap, and that of ranked tokens."""

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `LessIsMore.choose`."""
        sets, counts = super().choose(scores, seq_lens, slots, shared)
        if shared is not None:
            own, _ = super().choose(scores, seq_lens, slots)
            found = (own.unsqueeze(2) == sets.unsqueeze(1)).any(2).float()
            ranked = found[:, self.sizes.sinks : self.budget - self.sizes.recent]
            self.overlaps.append(torch.stack([found.mean(1), ranked.mean(1)]))
        return sets, counts


def siblings(context: ChainProblem, count: int, steps: int, draw: random.Random) -> Iterator[ChainProblem]:
    """Problems over the facts of one, each from another start."""
    facts = context.prompt.split(" ? ")[0]
    links = {node: (after, int(increment)) for node, after, increment in _FACT.findall(facts)}
    for start in draw.sample(sorted(links), count):
        node, total, words = start, 0, []
        for _ in range(steps):
            after, increment = links[node]
            total = (total + increment) % MODULUS
            words.append(f"v{node} -> v{after} + {increment} = {total} ;")
            node = after
        prompt, solution = f"{facts} ? v{start} steps {steps} :", f"{' '.join(words)} answer {total}"
        yield ChainProblem(prompt, solution, str(total), context.num_facts, steps)


class Pool:
    """Keys and values of all rows by KV slot; the facts of a context have one slot each, whoever reads them."""

    def __init__(self, model: ChainTracer, problems: list[list[ChainProblem]]) -> None:
        batches = [prefill(model, group) for group in problems]
        prompts, self.solution = encode([problem for group in problems for problem in group], "cpu")
        self.prompt = prompts.shape[1]
        self.last = torch.cat([batch.last for batch in batches])
        shared = 1 + len(problems[0][0].prompt.split(" ? ")[0].split())
        rows, width = len(prompts), self.prompt + self.solution.shape[1] - 1
        self.slots = torch.arange(1, rows * width + 1, dtype=torch.int32).view(rows, width)
        per_context = len(problems[0])
        for row in range(rows):
            self.slots[row, :shared] = self.slots[row - row % per_context, :shared]
        self.keys = [self._filled(batches, "keys", layer) for layer in range(model.shape.layers)]
        self.values = [self._filled(batches, "values", layer) for layer in range(model.shape.layers)]

    def _filled(self, batches: list[Prefilled], name: str, layer: int) -> Tensor:
        # [B, P, kv_heads, D], in float32: the torch operators would convert what they gather at every step.
        prompts = torch.cat([getattr(batch, name)[layer] for batch in batches]).transpose(1, 2).float()
        cache = prompts.new_zeros(self.slots.numel() + 1, *prompts.shape[2:])
        # A context's first row comes last, as its slots are the others' as well.
        for row in reversed(range(len(prompts))):
            cache[self.slots[row, : self.prompt].long()] = prompts[row]
        return cache


def forward(
    model: ChainTracer,
    pool: Pool,
    place: int,
    decoder: LayerDecode,
    plan: Plan,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """[B, hidden], what rows of the pool make of word `place` of their solutions; it ends the plan's slots."""
    shape, length = model.shape, plan.context.slots.shape[1]
    roles, scaling = decoder.method.layer_roles(shape.layers), Scaling(shape.scale)
    written = pool.slots[rows, length - 1].long()
    x = model.embed[pool.solution[rows, place : place + 1]]
    cos, sin = rope_table(torch.tensor([length - 1]), shape)
    for layer in range(shape.layers):
        w = model.weights(layer)
        q, k, v = project(x, w, cos, sin, shape, model.dtype)
        keys, values = pool.keys[layer], pool.values[layer]
        keys[written], values[written] = k[:, :, 0].float(), v[:, :, 0].float()
        out = decoder.run(plan, roles[layer], LayerInput(q[:, :, 0].float(), keys, values, scaling))
        x = finish(x, out.to(model.dtype).unsqueeze(2), w, shape, model.dtype)
    return x[:, 0]


def decoder_of(model: ChainTracer, method: Method, kept_sets: KeptSets | None = None) -> LayerDecode:
    """What decodes the model's layers by a method, on one rank."""
    heads = model.shape.heads
    return LayerDecode(method, HeadsOfRank(first=0, own=heads, all=heads), kept_sets=kept_sets)


@torch.inference_mode()
def decode(model: ChainTracer, pool: Pool, method: Method) -> tuple[Tensor, list[Plan]]:
    """bool [B, S], which words of the solutions are right; and the plans of the steps that decoded them."""
    rows, plans, decoder = [pool.last], [], decoder_of(model, method)
    for place in range(pool.solution.shape[1] - 1):
        length = pool.prompt + place + 1
        lens = torch.full((len(pool.slots),), length, dtype=torch.int32)
        plans.append(plan_reads(method, pool.slots[:, :length], lens, together=decoder.together, granule=GRANULE))
        rows.append(forward(model, pool, place, decoder, plans[-1]))
    return model.logits(torch.stack(rows, dim=1)).argmax(-1) == pool.solution, plans


def measure(model: ChainTracer, pool: Pool, method: Method) -> dict[str, Any]:
    """The columns that are found."""
    begin = time.monotonic()
    right, plans = decode(model, pool, method)
    found = {"whole_chains": right.all(1).float().mean(), "words": right.float().mean()}
    if isinstance(method, Compared):
        counts = torch.stack([plan.chosen.ends for plan in plans if plan.chosen is not None]).float()
        shared = [plan.shared.in_sets.already_read for plan in plans if plan.shared is not None]
        found["set_tokens"] = counts.mean()
        if shared:
            overlap = torch.stack(method.overlaps).mean(dim=(0, 2))
            found |= {"overlap": overlap[0], "overlap_ranked": overlap[1]}
            found["read_once"] = torch.stack(shared).sum() / counts.sum()
    seconds = round(time.monotonic() - begin)
    return {name: f"{float(value):.4f}" for name, value in found.items()} | {"seconds": seconds}


def compared_methods(args: argparse.Namespace) -> Iterator[Method]:
    """Full attention, then each budget with both ways of choosing what is shared."""
    yield Full()
    for budget, selection in product(args.budgets, ("request", "group")):
        yield Compared(
            budget=budget,
            recency=RECENCY,
            sinks=SINKS,
            aggregate=args.aggregate,
            selection_layers=args.selection,
            prefix_selection=selection,
        )


def main() -> None:
    """Measure, row by row; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/chain-tracer"))
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--siblings", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--rows", type=int, default=32, help="chains in all; a context has as many as there are siblings"
    )
    parser.add_argument("--aggregate", default="union")
    parser.add_argument("--selection", type=lambda text: tuple(map(int, text.split(","))), default=(2, 8))
    parser.add_argument("--facts", type=integer(2, NUM_NODES), default=330)
    parser.add_argument("--steps", type=integer(1, MAX_STEPS), default=12)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    require_columns(args.output, COLUMNS)
    model = ChainTracer().to(torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, args.model)
    machine = machine_line()
    for siblings_ in args.siblings:
        contexts = args.rows // siblings_
        drawn = (random.Random(f"{args.seed}/{n}") for n in range(contexts))
        problems = []
        for draw in drawn:
            context = make_chain(draw, num_facts=args.facts, num_steps=1)
            problems.append(list(islice(siblings(context, siblings_, args.steps, draw), siblings_)))
        pool = Pool(model, problems)
        asked = {"siblings": siblings_, "contexts": contexts, "facts": args.facts, "steps": args.steps}
        for method in compared_methods(args):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | asked | {"seed": args.seed, "machine": machine}
            row["prefix_selection"] = method.prefix_selection if isinstance(method, Compared) else "full"
            if isinstance(method, Compared):
                layers = "-".join(map(str, args.selection))
                row |= {"budget": method.budget, "aggregate": args.aggregate, "selection_layers": layers}
            row |= measure(model, pool, method)
            append_rows(args.output, COLUMNS, [row])
            print(*(f"{name}={row[name]}" for name in (*_ASKED, *_FOUND) if row[name] != ""), flush=True)


if __name__ == "__main__":
    command.run(main)
