"""Measure the chain tracer: accuracy against budget, fixed or adaptive, and size; the search for selection layers.

    PYTHONPATH=.:kernels:training python -m chain_tracer.accuracy budget models/chain-tracer --selection 2,8 \\
        --csv benchmarks/results/chain_tracer_budget.csv
    … accuracy search models/chain-tracer --chains 64 --csv search.csv
    … accuracy sizes models/chain-tracer --chains 64 --csv sizes.csv
    … accuracy adaptive models/chain-tracer --chains 16 --csv benchmarks/results/chain_tracer_adaptive.csv
"""

import argparse
import csv
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from small_qwen3.bench import add_host_flags, numbers, where

from sgl_lim.tasks.chains import generate_chains

from .decode import Policy, Prefilled, Reads, prefill, score
from .model import ChainTracer, load_checkpoint

BUDGETS = (64, 128, 256, 512)
FEW = (20, 24, 28, 32, 40, 48, 64, 128, 256)
"""Budgets that are as small as adaptive sets."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ASKED = ("method", "aggregate", "budget", "selection_layers", "dense_below", "facts", "steps", "chains", "seed")
MEASURED = ("whole_chains", "tokens", "weights_sha256", "device", "torch", "commit")
FIELDS = (*ASKED, *MEASURED, "recency", "top_p", "attended")


def budget_policies(selection: tuple[int, ...]) -> Iterator[Policy]:
    """Full attention; at each budget LessIsMore with each aggregate, the window alone, the window with full layers."""
    yield Policy("full")
    for aggregate in ("union", "max", "sum"):
        yield from (Policy("lessismore", b, selection, aggregate) for b in BUDGETS)
    yield from (Policy("window", b) for b in BUDGETS)
    yield from (Policy("window", b, selection) for b in BUDGETS)


def adaptive_policies(selection: tuple[int, ...]) -> Iterator[Policy]:
    """Fixed budgets, and sets of at most the largest of them that hold a share, beside a window of two kinds."""
    yield Policy("full")
    for recency in (0.25, None):
        yield from (Policy("lessismore", budget, selection, "sum", recency) for budget in FEW)
        yield from (Policy("lessismore", FEW[-1], selection, "sum", recency, share) for share in SHARES)


def search_policies(firsts: Iterable[int], seconds: Iterable[int], budgets: Iterable[int]) -> Iterator[Policy]:
    """Every pair of selection layers at every budget, after full attention."""
    yield Policy("full")
    for first in firsts:
        for second in seconds:
            if second > first + 1:
                yield from (Policy("lessismore", b, (first, second)) for b in budgets)
    yield from (Policy("window", b) for b in budgets)


class Bench:
    """A model on a device, measured on freshly drawn problems; every row says on what."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = ChainTracer().to(args.device, torch.bfloat16).requires_grad_(False)
        load_checkpoint(self.model, args.folder)
        self.chains, self.seed, self.batch = args.chains, args.seed, args.batch
        self.machine = where(args).values()

    def prefilled(self, facts: int, steps: int) -> list[Prefilled]:
        problems = list(generate_chains(self.chains, num_facts=facts, num_steps=steps, seed=self.seed))
        return [prefill(self.model, problems[i : i + self.batch]) for i in range(0, len(problems), self.batch)]

    def row(self, batches: list[Prefilled], policy: Policy, facts: int, steps: int) -> dict[str, object]:
        reads = Reads()
        right = torch.cat([score(self.model, b, policy, reads) for b in batches])
        whole, tokens = right.all(dim=1).float().mean().item(), right.float().mean().item()
        sparse = policy.method != "full"
        selection = "-".join(map(str, policy.selection))
        aggregate = policy.aggregate if policy.method == "lessismore" else ""
        budget, dense = (policy.budget, policy.dense_below) if sparse else ("", "")
        asked = (policy.method, aggregate, budget, selection, dense, facts, steps, self.chains, self.seed)
        recency = ("auto" if policy.recency is None else policy.recency) if policy.method == "lessismore" else ""
        adaptive = (recency, "" if policy.top_p is None else policy.top_p, f"{reads.attended / reads.dense:.4f}")
        return dict(zip(FIELDS, (*asked, f"{whole:.4f}", f"{tokens:.5f}", *self.machine, *adaptive), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("budget", "adaptive", "search", "sizes"))
    parser.add_argument("folder", type=Path, help="published model or training checkpoint; rounded to bfloat16")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--selection", type=numbers, default=(2, 8))
    parser.add_argument("--first", type=numbers, default=(2, 3, 4))
    parser.add_argument("--second", type=numbers, default=(5, 6, 7, 8, 9, 10, 11))
    parser.add_argument("--budgets", type=numbers, default=(64, 128, 256))
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--facts", type=int, default=330)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    add_host_flags(parser)
    args = parser.parse_args()
    bench = Bench(args)
    sizes = [(args.facts, args.steps)]
    policies = [Policy("full")]
    if args.what == "sizes":
        sizes = [(f, s) for f in (64, 128, 200, 330, 400) for s in (4, 16, 32, 48, 64)]
    elif args.what == "adaptive":
        policies = list(adaptive_policies(args.selection))
    elif args.what == "search":
        policies = list(search_policies(args.first, args.second, args.budgets))
    else:
        policies = list(budget_policies(args.selection))
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for facts, steps in sizes:
            batches = bench.prefilled(facts, steps)
            for policy in policies:
                begin = time.monotonic()
                row = bench.row(batches, policy, facts, steps)
                writer.writerow(row)
                file.flush()
                print(
                    *list(row.values())[:11], *list(row.values())[-3:], f"{time.monotonic() - begin:.2f}s", flush=True
                )


if __name__ == "__main__":
    main()
