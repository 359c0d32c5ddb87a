"""What sets that outlive a step are worth on the small model: recall against fresh sets, right chains, tokens attended.

    PYTHONPATH=training python -m benchmarks.warm_start --output out/warm_start.csv

`recall` rows: every row chooses afresh at every step and all of it is remembered; the set that it has before it chooses
is compared with what it chooses. `recall` is the share of the fresh set's ranked tokens that are in the set it has,
`chance` that of a set drawn at random. `begins`: `own`, its set of the step before; `fork`, what its slots remember at
the first step of a chain through facts that another chain has been decoded over; `turn`, the same where the other
chain is a part of the context and the new one its next question. `had`: of the rows, those that have a set.

`chains` rows: whole chains and words that are right, and the share of a dense decode's tokens that is attended to, with
`--lim-selection-interval` and `--lim-early-sets` as in a server, by the same code. Rows are fed the right words: all
words of a chain right is the same event as a greedy generation of the whole chain. With `early_sets` at `random`, the
control, early layers attend to tokens drawn anew at every step in place of the ranked ones.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from chain_tracer.model import ChainTracer, load_checkpoint
from torch import Tensor

from benchmarks.machine import machine_line
from benchmarks.prefix_selection import Pool, decoder_of, forward, siblings
from benchmarks.results_file import append_rows, require_columns
from lim_kernels import decide_actions, keep_sets
from lim_kernels.row_actions import EARLY, RECALL, SELECT
from sgl_lim import command
from sgl_lim.methods import Keeping, LessIsMore, SharedSets
from sgl_lim.programs.argument_types import integer
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.reads import plan_reads
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES, ChainProblem, generate_chains, make_chain

_ASKED = ("measured", "budget", "selection_layers", "interval", "early_sets", "facts", "steps", "requests", "seed")
_FOUND = ("layer", "begins", "compared", "had", "recall", "chance", "whole_chains", "words", "attended", "seconds")
COLUMNS = (*_ASKED, *_FOUND, "machine")


@dataclass(frozen=True)
class Watched(LessIsMore):
    """The method, which also notes what it chose."""

    chosen: list[Tensor] = field(default_factory=list)
    """Of each selection of a step int32 [B, K], positions."""

    def choose(
        self, scores: Tensor, seq_lens: Tensor, slots: Tensor | None, shared: SharedSets | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `LessIsMore.choose`."""
        self.chosen.append(super().choose(scores, seq_lens, None, shared)[0])
        return super().choose(scores, seq_lens, slots, shared)


def kept_sets(method: LessIsMore, keeping: Keeping, num_rows: int, num_slots: int) -> KeptSets:
    """Room for the sets of so many rows and slots."""
    layers = len(method.selection_layers)
    return KeptSets(keeping, method.sizes, layers, num_rows=num_rows, num_slots=num_slots, device="cpu")


class Recall:
    """Decodes rows by fresh sets, remembers these, and compares each with the one that was there before."""

    def __init__(self, model: ChainTracer, method: Watched, num_rows: int, num_slots: int) -> None:
        self.model, self.method = model, method
        self.decoder = decoder_of(model, method)
        self.memory = kept_sets(method, Keeping(interval=2, early=False), num_rows, num_slots).memory
        self.shares: dict[tuple[int, str], list[float]] = defaultdict(list)
        self.began: dict[str, list[bool]] = defaultdict(list)

    def decode(self, pool: Pool, rows: Tensor, slots: Tensor, request_rows: Tensor, words: int, begins: str) -> None:
        """Decode some words of rows of the pool; `slots` [B, L] are what the memory knows their positions by."""
        tenants = torch.ones_like(self.memory.tenants)
        actions = torch.full((len(rows),), SELECT, dtype=torch.uint8)
        for place in range(words):
            length = pool.prompt + place + 1
            lens = torch.full((len(rows),), length, dtype=torch.int32)
            at = request_rows, tenants, slots[:, :length], lens
            decided = decide_actions(self.memory, *at, self.method.sizes, interval=1, early=True)
            had = self.memory.sets[:, request_rows].clone()
            self.method.chosen.clear()
            plan = plan_reads(self.method, pool.slots[rows, :length], lens, together=self.decoder.together)
            forward(self.model, pool, place, self.decoder, plan, rows)
            if place == 0:
                self.began[begins] += ((decided.actions & RECALL) != 0).tolist()
            for layer, chosen in enumerate(self.method.chosen):
                ranked = chosen[:, self.method.sizes.sinks : self.method.budget - self.method.sizes.recent]
                shares = (ranked.unsqueeze(2) == had[layer].unsqueeze(1)).any(2).float().mean(1)
                there = (decided.actions & EARLY) != 0
                self.shares[layer, begins if place == 0 else "own"] += shares[there].tolist()
                room = torch.zeros(len(rows), self.method.budget, dtype=torch.int32)
                extended = torch.cat([room, slots[:, :length]], dim=1)
                keep_sets(self.memory, layer, request_rows, actions, extended, lens, chosen, self.method.sizes)


def measure_recall(model: ChainTracer, args: argparse.Namespace, budget: int) -> Iterator[dict[str, Any]]:
    """Requests over one context each, then a fork and a next turn of each."""
    method = Watched(budget=budget, selection_layers=args.selection)
    pairs, turns = [], []
    for n in range(args.contexts):
        draw = random.Random(f"{args.seed}/{n}")
        context = make_chain(draw, num_facts=args.facts, num_steps=1)
        first, fork, third = islice(siblings(context, 3, args.decoded, draw), 3)
        question = third.prompt[third.prompt.index(" ? ") :]
        pairs.append([first, fork])
        turns.append([ChainProblem(f"{first.prompt} {first.solution}{question}", third.solution, "", 0, 0)])
    pool, later = Pool(model, pairs), Pool(model, turns)
    words = pool.solution.shape[1] - 1
    firsts, request_rows = torch.arange(0, 2 * args.contexts, 2), torch.arange(1, args.contexts + 1)
    # A next turn holds the slots of the first chain, its answer's included.
    kept = pool.prompt + words
    fresh = torch.arange(len(turns) * (later.slots.shape[1] - kept), dtype=torch.int32).view(len(turns), -1)
    of_turns = torch.cat([pool.slots[firsts, :kept], fresh + pool.slots.numel() + 1], dim=1)
    recall = Recall(model, method, 3 * args.contexts + 1, int(of_turns.max()) + 1)
    recall.decode(pool, firsts, pool.slots[firsts], request_rows, words, "first")
    recall.decode(later, torch.arange(args.contexts), of_turns, request_rows + args.contexts, 2, "turn")
    recall.decode(pool, firsts + 1, pool.slots[firsts + 1], request_rows + 2 * args.contexts, 2, "fork")
    for (layer, begins), shares in sorted(recall.shares.items()):
        found: dict[str, Any] = {"layer": args.selection[layer], "begins": begins, "compared": len(shares)}
        if begins in recall.began:
            found["had"] = f"{sum(recall.began[begins]) / len(recall.began[begins]):.4f}"
        if shares:
            sizes = method.sizes
            chance = sizes.middle / (pool.prompt + words / 2 - sizes.recent - sizes.sinks)
            yield found | {"recall": f"{sum(shares) / len(shares):.4f}", "chance": f"{chance:.4f}"}
        elif begins != "first":
            yield found


@torch.inference_mode()
def measure_chains(
    model: ChainTracer, pool: Pool, args: argparse.Namespace, interval: int, early: str
) -> dict[str, Any]:
    """Right chains and the attended share, by the backend's own steps."""
    method = LessIsMore(budget=args.chain_budget, selection_layers=args.selection)
    batch, sizes = len(pool.slots), method.sizes
    request_rows = torch.arange(1, batch + 1)
    counters = Counters(method.budget, method.layer_roles(model.shape.layers), batch + 1, torch.device("cpu"))
    tenants, store = torch.ones(batch + 1, dtype=torch.int64), None
    if interval > 1 or early != "off":
        store = kept_sets(method, Keeping(interval, early != "off"), batch + 1, pool.slots.numel() + 1)
    decoder = decoder_of(model, method, store)
    right = [model.logits(pool.last).argmax(-1) == pool.solution[:, 0]]
    for place in range(pool.solution.shape[1] - 1):
        length = pool.prompt + place + 1
        lens = torch.full((batch,), length, dtype=torch.int32)
        extended = torch.cat([torch.zeros(batch, sizes.budget, dtype=torch.int32), pool.slots[:, :length]], dim=1)
        slots, kept = extended[:, sizes.budget :], None
        if store is not None:
            kept = store.begin(request_rows, tenants, extended, lens, None)
            if early == "random":
                candidates = torch.rand(batch, length - sizes.recent - sizes.sinks)
                drawn = candidates.topk(sizes.middle).indices.sort().values + sizes.sinks
                extended[:, sizes.sinks : sizes.budget - sizes.recent] = slots.gather(1, drawn)
        plan = plan_reads(method, slots, lens, together=decoder.together, kept=kept)
        counters.record(request_rows, plan)
        hidden = forward(model, pool, place, decoder, plan)
        right.append(model.logits(hidden).argmax(-1) == pool.solution[:, place + 1])
    words, totals = torch.stack(right, dim=1), counters.read()
    return {
        "whole_chains": int(words.all(1).sum()),
        "words": f"{float(words.float().mean()):.4f}",
        "attended": f"{totals['tokens_attended'] / totals['tokens_dense']:.4f}",
    }


def main() -> None:
    """Measure, row by row; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/chain-tracer"))
    parser.add_argument("--selection", type=lambda text: tuple(map(int, text.split(","))), default=(2, 8))
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 128, 256], help="of `recall` rows")
    parser.add_argument("--contexts", type=int, default=8, help="of `recall` rows: three requests each")
    parser.add_argument("--decoded", type=int, default=6, help="steps of a chain in `recall` rows")
    settings = ["1", "2", "4", "8", "1+on", "1+random", "4+on"]
    parser.add_argument("--intervals", nargs="*", default=settings, help="of `chains` rows: N, N+on or N+random")
    parser.add_argument("--chains", type=int, default=24)
    parser.add_argument("--chain-budget", type=int, default=128)
    parser.add_argument("--steps", type=integer(1, MAX_STEPS), default=24, help="of a chain in `chains` rows")
    parser.add_argument("--facts", type=integer(2, NUM_NODES), default=330)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    require_columns(args.output, COLUMNS)
    model = ChainTracer().to(torch.bfloat16).requires_grad_(False)
    load_checkpoint(model, args.model)
    layers = "-".join(map(str, args.selection))
    common = {"selection_layers": layers, "facts": args.facts, "seed": args.seed, "machine": machine_line()}

    def write(row: dict[str, Any], begin: float) -> None:
        row = dict.fromkeys(COLUMNS, "") | common | row | {"seconds": round(time.monotonic() - begin)}
        append_rows(args.output, COLUMNS, [row])
        print(*(f"{name}={row[name]}" for name in (*_ASKED, *_FOUND) if row[name] != ""), flush=True)

    for budget in args.budgets:
        begin = time.monotonic()
        asked = {"measured": "recall", "budget": budget, "interval": 1, "steps": args.decoded}
        with torch.inference_mode():
            for found in measure_recall(model, args, budget):
                write(asked | {"requests": 3 * args.contexts} | found, begin)
    if args.intervals:
        problems = list(generate_chains(args.chains, num_facts=args.facts, num_steps=args.steps, seed=args.seed))
        pool = Pool(model, [[problem] for problem in problems])
    for setting in args.intervals:
        begin, (interval, _, early) = time.monotonic(), setting.partition("+")
        if early not in ("", "on", "random"):
            parser.error(f"--intervals takes N, N+on or N+random, got {setting}")
        asked = {"measured": "chains", "budget": args.chain_budget, "interval": interval, "steps": args.steps}
        asked |= {"early_sets": early or "off", "requests": args.chains}
        write(asked | measure_chains(model, pool, args, int(interval), early or "off"), begin)


if __name__ == "__main__":
    command.run(main)
