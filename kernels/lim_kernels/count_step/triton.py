"""Step accounting in Triton: one program, because a step's rows are few and its launches dear."""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels import acts as bits
from lim_kernels.triton_support import plan_block

_SELECT = tl.constexpr(bits.SELECT)
_RECALL = tl.constexpr(bits.RECALL)
_EARLY = tl.constexpr(bits.EARLY)


@triton.jit(
    do_not_specialize=[
        "batch",
        "budget",
        "num_layers",
        "sparse_layers",
        "selection_layers",
        "early_layers",
        "grouped_layers",
    ]
)
def count_step_kernel(
    totals_ptr,
    seen_ptr,
    sparse_rows_ptr,
    rows_ptr,
    generations_ptr,
    seq_lens_ptr,
    acts_ptr,
    followed_ptr,
    paths_ptr,
    set_followed_ptr,
    set_counts_ptr,
    batch,
    budget,
    num_layers,
    sparse_layers,
    selection_layers,
    early_layers,
    grouped_layers,
    ACTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Count all rows."""
    items = tl.arange(0, BLOCK_ROWS)
    rows = tl.load(rows_ptr + items, mask=items < batch, other=0).to(tl.int64)
    real = rows != 0
    lens = tl.load(seq_lens_ptr + items, mask=items < batch, other=0).to(tl.int64)
    lens = tl.where(real, lens, 0)
    # Where sets outlive a step, selection layers may be sparse too.
    sparse = (lens > budget) & ((sparse_layers > 0) | ACTS)
    current = tl.load(generations_ptr + rows, mask=real, other=0)
    new = (tl.load(seen_ptr + rows, mask=real, other=0) != current) & real
    before = (tl.load(sparse_rows_ptr + rows, mask=real, other=0) != 0) & (new == 0)
    sets = tl.minimum(lens, budget)
    if SETS:
        sets = tl.where(real, tl.load(set_counts_ptr + items, mask=items < batch, other=0).to(tl.int64), 0)
    attended = (num_layers - sparse_layers) * lens + sparse_layers * sets
    selecting = sparse
    if ACTS:
        acts = tl.load(acts_ptr + items, mask=items < batch, other=0).to(tl.int32)
        selecting = sparse & ((acts & _SELECT) != 0)
        attended -= tl.where(sparse & ((acts & _SELECT) == 0), selection_layers * (lens - budget), 0)
        attended -= tl.where(sparse & ((acts & _EARLY) != 0), early_layers * (lens - budget), 0)
        add(totals_ptr, 8, tl.sum((sparse & ((acts & _RECALL) != 0)).to(tl.int64), axis=0))

    add(totals_ptr, 0, tl.max(real.to(tl.int64), axis=0))
    add(totals_ptr, 1, tl.sum(attended, axis=0))
    add(totals_ptr, 2, num_layers * tl.sum(lens, axis=0))
    add(totals_ptr, 3, selection_layers * tl.sum(selecting.to(tl.int64), axis=0))
    add(totals_ptr, 4, tl.sum(new.to(tl.int64), axis=0))
    add(totals_ptr, 5, tl.sum((sparse & (before == 0)).to(tl.int64), axis=0))
    if GROUPS:
        followed = tl.load(followed_ptr + items, mask=items < batch, other=0).to(tl.int64)
        paths = tl.load(paths_ptr + items, mask=items < batch, other=-1)
        shared = grouped_layers * tl.sum(followed, axis=0)
        if SETS:
            followed = tl.load(set_followed_ptr + items, mask=items < batch, other=0).to(tl.int64)
            shared += sparse_layers * tl.sum(followed, axis=0)
        add(totals_ptr, 6, shared)
        add(totals_ptr, 7, tl.sum((paths >= 0).to(tl.int64), axis=0))
    tl.store(seen_ptr + rows, current, mask=real)
    tl.store(sparse_rows_ptr + rows, (before | sparse).to(tl.uint8), mask=real)


@triton.jit
def add(totals_ptr, index: tl.constexpr, amount):
    """Add to one total; no other program does."""
    tl.store(totals_ptr + index, tl.load(totals_ptr + index) + amount)


@triton.jit(do_not_specialize=["batch", "budget", "layers"])
def count_sets_kernel(
    totals_ptr,
    rows_ptr,
    seq_lens_ptr,
    set_counts_ptr,
    batch,
    budget,
    layers,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Add what the sets of all rows have beyond, or rather short of, the budget."""
    items = tl.arange(0, BLOCK_ROWS)
    heads = tl.arange(0, BLOCK_HEADS)
    real = tl.load(rows_ptr + items, mask=items < batch, other=0) != 0
    sets = tl.minimum(tl.load(seq_lens_ptr + items, mask=real, other=0).to(tl.int64), budget)
    # [BLOCK_ROWS, BLOCK_HEADS]
    there = real[:, None] & (heads < HEADS)[None, :]
    counts = tl.load(set_counts_ptr + items[:, None] * HEADS + heads[None, :], mask=there, other=0).to(tl.int64)
    short = layers * (HEADS * tl.sum(sets, axis=0) - tl.sum(tl.sum(counts, axis=1), axis=0))
    # Rounded up, as division of integers goes towards zero: what is left is rounded down.
    add(totals_ptr, 1, -((short + HEADS - 1) // HEADS))


def count_step(
    totals: Tensor,
    seen: Tensor,
    sparse_rows: Tensor,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    num_layers: int,
    sparse_layers: int,
    selection_layers: int,
    acts: Tensor | None,
    early_layers: int,
    followed: Tensor | None,
    paths: Tensor | None,
    grouped_layers: int,
    set_followed: Tensor | None,
    set_counts: Tensor | None,
) -> None:
    """See `api.count_step`."""
    count_step_kernel[(1,)](
        totals_ptr=totals,
        seen_ptr=seen,
        sparse_rows_ptr=sparse_rows,
        rows_ptr=rows,
        generations_ptr=generations,
        seq_lens_ptr=seq_lens,
        acts_ptr=acts,
        followed_ptr=followed,
        paths_ptr=paths,
        set_followed_ptr=set_followed,
        set_counts_ptr=set_counts,
        batch=len(rows),
        budget=budget,
        num_layers=num_layers,
        sparse_layers=sparse_layers,
        selection_layers=selection_layers,
        early_layers=early_layers,
        grouped_layers=grouped_layers,
        ACTS=acts is not None,
        GROUPS=followed is not None,
        SETS=set_counts is not None,
        BLOCK_ROWS=plan_block(len(rows)),
        num_warps=4,
    )


def count_sets(totals: Tensor, rows: Tensor, seq_lens: Tensor, set_counts: Tensor, *, budget: int, layers: int) -> None:
    """See `api.count_sets`."""
    heads = 1 if set_counts.dim() == 1 else set_counts.shape[1]
    count_sets_kernel[(1,)](
        totals_ptr=totals,
        rows_ptr=rows,
        seq_lens_ptr=seq_lens,
        set_counts_ptr=set_counts,
        batch=len(rows),
        budget=budget,
        layers=layers,
        HEADS=heads,
        BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_ROWS=plan_block(len(rows)),
        num_warps=4,
    )
