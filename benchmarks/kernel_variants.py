"""How many kernels the first start of a server compiles, and how long that takes.

    python -m benchmarks.kernel_variants                        # counts them; needs no GPU
    TRITON_CACHE_DIR=$(mktemp -d) python -m benchmarks.kernel_variants --threads 1 16

With `--threads` they are compiled, each time by so many threads, for the GPU at hand or for `--capability`; each number
runs in a process of its own, with an empty cache. Shapes are Qwen3-8B's. Prints a JSON line for each measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from lim_kernels.rehearsal import use_absent_device
from sgl_lim import command
from sgl_lim.methods import HeadsOfRank
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.serving.ranks import RankExchange
from sgl_lim.serving.rehearsal import META, NobodyElse, Stage, rehearse
from sgl_lim.settings.config import configure

CAPTURED = (1, 2, 4, 8, 12, *range(16, 257, 8))
"""SGLang's default batch sizes where graphs have at most 256 rows."""
FORMS: dict[str, dict[str, Any]] = {
    "union": {},
    "max": {"aggregate": "max"},
    "union-set": {"selection_attends": "set"},
    "max-set": {"aggregate": "max", "selection_attends": "set"},
    "kv-head": {"scope": "kv_head", "aggregate": "max"},
    "group": {"prefix_selection": "group"},
    "interval": {"selection_interval": 4},
    "top-p": {"aggregate": "max", "top_p": 0.9},
}


def stage_of(form: str, ranks: int = 1) -> Stage:
    """Qwen3-8B with one of the FORMS on the first of so many ranks, in a pool whose rows have 40,960 tokens."""
    method = configure(method="lessismore", selection_layers=(2, 12), **FORMS[form]).build()
    assert isinstance(method, Ranked)
    slots, heads, kept = 1 << 16, HeadsOfRank(0, 32 // ranks, 32), None
    if method.keeping is not None:
        kept = KeptSets(method.keeping, method.sizes, 2, num_rows=300, num_slots=slots, device=META)
    exchange = RankExchange(NobodyElse(ranks), 0, ranks) if ranks > 1 else None
    cache = torch.empty(slots, 8 // ranks, 128, dtype=torch.bfloat16, device=META)
    return Stage(
        LayerDecode(method, heads, exchange, kept),
        method.layer_roles(36),
        dense_by_kernels=False,
        granule=128,
        width=40_976,
        request_rows=300,
        slots=slots,
        q_dtype=torch.bfloat16,
        keys=cache,
        values=cache,
    )


def variants(stage: Stage, batches: Sequence[int]) -> Counter[str]:
    """How many variants of each kernel steps of these batch sizes launch."""
    seen: set[tuple[str, str]] = set()
    run, compiles = JITFunction.run, JITFunction._do_compile

    def note(kernel, key, *arguments):
        seen.add((kernel.__name__, key))

    def compile_only(kernel, *arguments, grid, warmup, **named):
        return run(kernel, *arguments, grid=grid, warmup=True, **named)

    JITFunction.run, JITFunction._do_compile = compile_only, note
    try:
        rehearse(stage, batches)
    finally:
        JITFunction.run, JITFunction._do_compile = run, compiles
    return Counter(name for name, _ in seen)


def compiled(stage: Stage, batches: Sequence[int], threads: int) -> tuple[int, float]:
    """How many kernels were compiled by so many threads, and the seconds that it took."""
    from lim_kernels.rehearsal import rehearsed

    began = time.perf_counter()
    with rehearsed(threads) as found:
        rehearse(stage, batches)
    return len(found.raw_futures), time.perf_counter() - began


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["union", "max"])
    parser.add_argument("--batches", nargs="+", type=int, default=CAPTURED)
    parser.add_argument("--threads", nargs="+", type=int, default=[])
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4, 8), default=1, help="of a tensor-parallel group")
    parser.add_argument("--capability", type=int, default=90, help="where there is no GPU")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        use_absent_device(given.capability)
    for form in given.forms:
        stage = stage_of(form, given.ranks)
        if not given.threads:
            counts = variants(stage, given.batches)
            print(json.dumps({"form": form, "batch_sizes": len(given.batches), "variants": counts.total(), **counts}))
        for threads in given.threads:
            if given.here:
                count, seconds = compiled(stage, given.batches, threads)
                print(json.dumps({"form": form, "kernels": count, "threads": threads, "seconds": round(seconds, 1)}))
            else:
                _compile_anew(form, threads, given)


def _compile_anew(form: str, threads: int, given: argparse.Namespace) -> None:
    """Measure in another process."""
    module = [sys.executable, "-m", "benchmarks.kernel_variants", "--here", "--forms", form, "--threads", str(threads)]
    asked = ["--ranks", given.ranks, "--capability", given.capability, "--batches", *given.batches]
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run([*module, *map(str, asked)], env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True)


if __name__ == "__main__":
    command.run(main)
