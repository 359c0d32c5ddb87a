"""Compiles every Triton kernel for a GPU that need not be there, as the launchers launch them.

    usage: PYTHONPATH=training python compile_kernels.py 90 [FOLDER]        (compute capability 9.0)

Prints a JSON line a launch, and with FOLDER writes its PTX there: two folders tell what a change does to the generated
code (TRITON_DISABLE_LINE_INFO=1, then `diff -r before after`). Runs without TRITON_INTERPRET, in a process of its own:
the interpreter accepts programs that the compiler refuses.
"""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from block_gates.truth import block_truth
from block_gates.truth import triton as training_kernels
from triton.runtime.jit import JITFunction

from lim_kernels import (
    DraftMemory,
    DraftSizes,
    Scaling,
    SetSizes,
    adapt_budgets,
    bound_pages,
    choose_for_groups,
    choose_pages,
    choose_tokens,
    count_decode_step,
    count_sets,
    decide_actions,
    decode_with_scores,
    deepen_scores,
    expand_pages,
    find_prefix_groups,
    gate_keys,
    grouped_decode,
    groups_of_sets,
    keep_sets,
    place_drafts,
    place_sets,
    score_blocks,
    score_context,
    score_pages,
    score_tokens,
    select_tokens,
    sparse_decode,
)
from lim_kernels.block_gates import Gate, GatedBlocks, Rotation
from lim_kernels.count_decode_step import Layers, Ledger, Sharing
from lim_kernels.page_bounds import PageBounds
from lim_kernels.rehearsal import modules, use_absent_device
from lim_kernels.set_memory import SetMemory


def compile_instead_of_launching(capability: int, folder: Path | None = None) -> None:
    launches: Counter[str] = Counter()
    use_absent_device(capability)

    def compile_and_report(kernel, *args, grid, **kwargs):
        compiled = kernel.warmup(*args, grid=grid, **kwargs)
        report = {"kernel": kernel.__name__, "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
        print(json.dumps(report), flush=True)
        if folder is not None:
            (folder / f"{kernel.__name__}.{launches[kernel.__name__]:03}.ptx").write_text(compiled.asm["ptx"])
        launches[kernel.__name__] += 1
        return compiled

    JITFunction.__getitem__ = lambda kernel, grid: partial(compile_and_report, kernel, grid=grid)


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_decode(batch, heads, kv_heads, dim, dtype, cache_dtype=None, **scales) -> None:
    q = empty(batch, heads, dim, dtype=dtype)
    cache = empty(1 << 16, kv_heads, dim, dtype=cache_dtype or dtype)
    indices = empty(batch, 4096), empty(batch)
    scaling = {"scale": 0.1, **scales}
    sparse_decode(q, cache, cache, *indices, **scaling, implementation="triton")
    decode_with_scores(q, cache, cache, *indices, Scaling(**scaling), score_beyond=2048, implementation="triton")


def launch_grouped(batch, heads, kv_heads, dim, dtype, cache_dtype=None, *, scored=False, **scales) -> None:
    q = empty(batch, heads, dim, dtype=dtype)
    cache = empty(1 << 16, kv_heads, dim, dtype=cache_dtype or dtype)
    indices = empty(batch, 4096), empty(batch)
    groups = find_prefix_groups(*indices, granule=128, implementation="triton")
    how = {"scored": scored, "score_beyond": 2048, "implementation": "triton"}
    grouped_decode(q, cache, cache, *indices, groups, Scaling(0.1, **scales), **how)


def launch_scores(batch, heads, kv_heads, dim, dtype, cache_dtype=None, *, grouped=False, **scales) -> None:
    q = empty(batch, heads, dim, dtype=dtype)
    keys = empty(1 << 16, kv_heads, dim, dtype=cache_dtype or dtype)
    indices = empty(batch, 4096), empty(batch)
    groups = find_prefix_groups(*indices, granule=128, implementation="triton") if grouped else None
    how = {"groups": groups, "score_beyond": 2048, "implementation": "triton"}
    score_context(q, keys, *indices, Scaling(0.1, **scales), **how)


def launch_set_memory(layers: int, *, interval: int, early: bool) -> None:
    sizes, triton = SetSizes(2048, recent=508, sinks=4), {"implementation": "triton"}
    per_row = empty(9, dtype=torch.int64), empty(9), empty(9)
    memory = SetMemory(empty(layers, 9, 1536), empty(layers, 1 << 16), *per_row, empty(1))
    rows, lens, extended = empty(4, dtype=torch.int64), empty(4), empty(4, 2048 + 4096)
    slots = extended[:, 2048:]
    decided = decide_actions(memory, rows, per_row[0], slots, lens, sizes, interval=interval, early=early, **triton)
    place_sets(memory, 0, rows, decided.actions, extended, lens, sizes, **triton)
    for layer in range(layers):
        keep_sets(memory, layer, rows, decided.actions, extended, lens, empty(4, 2048), sizes, **triton)
    find_prefix_groups(
        slots, lens, granule=128, set_columns=2048, uses_set=decided.select_uses_set, implementation="triton"
    )


def launch_drafts(layers: int, heads: int) -> None:
    memory = DraftMemory.empty(layers, 9, heads, 2048, empty(1).device)
    rows, tenants = empty(4, dtype=torch.int64), empty(9, dtype=torch.int64)
    sizes = DraftSizes(2048, sinks=4, room=16)
    place_drafts(memory, rows, tenants, empty(4, 4096), empty(4), sizes, implementation="triton")


def launch_page_bounds(batch, heads, kv_heads, dim, dtype, cache_dtype=None) -> None:
    triton = {"implementation": "triton"}
    bounds = PageBounds(*(empty(1 << 12, kv_heads, dim, dtype=dtype) for _ in range(2)))
    written = empty(batch, dtype=torch.int64)
    bound_pages(bounds, empty(1 << 16, kv_heads, dim, dtype=cache_dtype or dtype), written, **triton)
    slots, lens = empty(batch, 4096), empty(batch)
    score_pages(empty(batch, heads, dim, dtype=dtype), bounds, slots, lens, score_beyond=2048, **triton)


def launch_page_sets(batch, heads, page, width, threshold=None) -> None:
    how, lens = {"page": page, "implementation": "triton"}, empty(batch)
    scores = empty(batch, heads, width, dtype=torch.float32)
    pages, counts = choose_pages(scores, lens, most=32, threshold=threshold, **how)
    expand_pages(pages, counts, empty(batch, page * width), lens, **how)


def launch_gates(batch, heads, kv_heads, dim, dtype, cache_dtype=None, *, block=64, width=128, plain=False) -> None:
    pools = ("avg",) if plain else ("max", "min", "avg")
    norm = None if plain else empty(width, dtype=dtype)
    own = None if plain else Rotation(empty(4096, width, dtype=torch.float32))
    weights = (empty(kv_heads, inputs, width, dtype=dtype) for inputs in (heads // kv_heads * dim, len(pools) * dim))
    blocks = GatedBlocks(
        gate=Gate(*weights, norm, norm, pools, own),
        keys=empty((1 << 16) // block, kv_heads, width, dtype=dtype),
        block=block,
        rotation=Rotation(empty(4096, dim // 2 if plain else dim, dtype=torch.float32), interleaved=plain),
    )
    triton, positions = {"implementation": "triton"}, empty(batch, dtype=torch.int64)
    cache = empty(1 << 16, kv_heads, dim, dtype=cache_dtype or dtype)
    gate_keys(blocks, cache, positions, positions, k_scale=0.5 if cache_dtype else 1.0, **triton)
    q, slots, lens = empty(batch, heads, dim, dtype=dtype), empty(batch, 4096), empty(batch)
    score_blocks(q, blocks, slots, lens, score_beyond=2048, **triton)


def launch_truth(batch, heads, kv_heads, dim, dtype, *, length, block) -> None:
    first = length // 2
    q = empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)[:, :, first:]
    k = empty(batch, length, kv_heads, dim, dtype=dtype).transpose(1, 2)
    block_truth(q, k, first, scale=0.1, block=block, implementation="triton")


def launch_all(*, fp8: bool, widest: bool) -> None:
    """Every launcher with the operands that decide its kernels; `widest` adds unions whose sorts take a minute."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # A few rows, and more than the device has multiprocessors.
    for batch in (1, 64):
        launch_decode(batch, 32, 8, 128, bf16)
        launch_decode(batch, 32, 8, 128, fp32)
        launch_decode(batch, 16, 8, 256, bf16, logit_cap=50.0)
        if fp8:
            launch_decode(batch, 32, 8, 128, bf16, torch.float8_e4m3fn, k_scale=0.5, v_scale=2.0)
    launch_decode(17, 14, 2, 80, fp16)
    launch_grouped(64, 32, 8, 128, bf16)
    launch_grouped(4, 32, 8, 128, bf16, scored=True)
    launch_grouped(300, 16, 8, 256, fp32, scored=True, logit_cap=50.0)
    launch_grouped(17, 14, 2, 80, fp16)
    if fp8:
        launch_grouped(16, 32, 8, 128, bf16, torch.float8_e4m3fn, scored=True, k_scale=0.5, v_scale=2.0)
    launch_decode(3, 16, 1, 64, bf16)
    launch_scores(1, 9, 3, 64, bf16)
    for grouped in (False, True):
        launch_scores(64, 32, 8, 128, bf16, grouped=grouped)
        launch_scores(17, 16, 8, 256, fp32, grouped=grouped, logit_cap=50.0)
        if fp8:
            launch_scores(4, 32, 8, 128, bf16, torch.float8_e4m3fn, grouped=grouped, k_scale=0.5)
    sparse_decode(
        empty(3, 32, 128, dtype=bf16),
        *[empty(1 << 16, 8, 128, dtype=bf16)] * 2,
        empty(3, 8, 2048, dtype=torch.int64),
        empty(3, 8, dtype=torch.int64),
        scale=0.1,
        implementation="triton",
    )

    logits, seq_lens = empty(4, 32, 32768, dtype=fp32), empty(4)
    triton = {"implementation": "triton"}
    select_tokens(logits, seq_lens, budget=2048, recent=512, sinks=4, **triton)
    rank, sizes = {"first_head": 0, "num_heads": 64}, SetSizes(2048, recent=512, sinks=4)
    scores = score_tokens(logits, seq_lens, sizes, shallow=True, **rank, **triton)
    deepen_scores(scores, logits, seq_lens, sizes, **rank, **triton)
    sizes = SetSizes(8192, recent=0, sinks=0)
    if widest:
        select_tokens(logits, seq_lens, **vars(sizes), **triton)
    for aggregate in ("max", "sum"):
        lse = empty(4, 32, dtype=fp32)
        scores = score_tokens(logits, seq_lens, sizes, aggregate=aggregate, lse=lse, **triton)
    choose_tokens(scores, seq_lens, sizes, slots=empty(4, 32768), **triton)
    for how in ({"find_recent": True}, {"top_p": 0.9}, {"find_recent": True, "top_p": 0.9}):
        budgets, recents = adapt_budgets(scores, seq_lens, SetSizes(2048, recent=16, sinks=4), **how, **triton)
        choose_tokens(scores, seq_lens, sizes, budgets=budgets, recents=recents, **triton)
    choose_tokens(scores, seq_lens, sizes, budgets=budgets, **triton)
    for batch, to_slots, combine in ((4, False, "max"), (300, True, "logsumexp")):
        slots, lens = empty(batch, 32768), empty(batch)
        how = {"combine": combine, "slots": slots if to_slots else None}
        groups = find_prefix_groups(slots, lens, granule=128, **triton)
        choose_for_groups(empty(batch, 32768, dtype=fp32), lens, groups, sizes, **how, **triton)

    launch_page_bounds(64, 32, 8, 128, bf16)
    launch_page_bounds(3, 16, 1, 64, fp32)
    launch_page_bounds(17, 14, 2, 80, fp16)
    launch_page_bounds(1, 64, 2, 256, bf16)
    if fp8:
        launch_page_bounds(16, 32, 8, 128, bf16, torch.float8_e4m3fn)
        launch_page_bounds(16, 4, 4, 128, fp16, torch.float8_e5m2)
    for width in (40, 2048, 8192, 20_000):
        launch_page_sets(64, 8, 16, width)
        launch_page_sets(3, 2, 64, width, threshold=0.01)
    for batch in (1, 64):
        launch_gates(batch, 32, 8, 128, bf16)
    launch_gates(3, 8, 2, 64, fp32, block=16, width=64)
    launch_gates(17, 14, 2, 80, fp16, block=32, width=64, plain=True)
    launch_gates(2, 16, 8, 256, bf16, width=256)
    if fp8:
        launch_gates(16, 32, 8, 128, bf16, torch.float8_e4m3fn)

    for block in (16, 64):
        launch_truth(16, 9, 3, 64, bf16, length=4096, block=block)
    launch_truth(2, 32, 8, 128, bf16, length=4096, block=64)
    launch_truth(1, 16, 8, 256, bf16, length=2400, block=64)
    for dim, block in ((64, 16), (128, 64)):
        launch_truth(1, 14, 2, dim, fp32, length=2400, block=block)

    launch_set_memory(2, interval=4, early=False)
    launch_set_memory(1, interval=1, early=True)
    for heads in (1, 8):
        launch_drafts(2, heads)
    # Eight tokens that are verified together are as many query heads.
    launch_grouped(8, 8 * 32, 8, 128, bf16)

    rows, tenants = empty(4, dtype=torch.int64), empty(9, dtype=torch.int64)
    ledger, layers = Ledger.empty(9, "meta"), Layers(32, sparse=28, selecting=2)
    groups = find_prefix_groups(empty(4, 4096), seq_lens, granule=128, **triton)
    in_sets, set_counts = groups_of_sets(seq_lens, groups, sizes, smallest=32, **triton)
    grouped, in_parts = Sharing(groups, 4), Sharing(groups, 4, in_sets, set_counts)
    for sharing, actions in ((None, None), (grouped, None), (in_parts, None), (grouped, empty(4, dtype=torch.uint8))):
        count_decode_step(
            ledger, rows, tenants, seq_lens, layers, budget=2048, sharing=sharing, actions=actions, **triton
        )
    for counts in (empty(4), empty(4, 8)):
        count_sets(ledger, rows, seq_lens, counts, budget=2048, layers=9, **triton)


if __name__ == "__main__":
    compile_instead_of_launching(int(sys.argv[1]), *map(Path, sys.argv[2:]))
    everywhere = [*modules(), training_kernels]
    own = [v for m in everywhere for v in vars(m).values() if isinstance(v, JITFunction) and v.__module__ == m.__name__]
    for kernel in own:
        if kernel.__name__.endswith("_kernel"):
            print(json.dumps({"declared": kernel.__name__}))
    # In tests the GPU with the least shared memory stands for all.
    launch_all(fp8=int(sys.argv[1]) >= 89, widest=int(sys.argv[1]) == 89 or len(sys.argv) > 2)
