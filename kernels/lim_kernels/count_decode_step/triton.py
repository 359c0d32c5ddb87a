"""Step accounting in Triton: one program, because a step's rows are few and its launches dear."""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels import row_actions
from lim_kernels.count_decode_step.ledger import TOTALS, Ledger
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.triton_support import plan_block

_SELECT = tl.constexpr(row_actions.SELECT)
_RECALL = tl.constexpr(row_actions.RECALL)
_EARLY = tl.constexpr(row_actions.EARLY)
_DECODE_STEPS = tl.constexpr(TOTALS.index("decode_steps"))
_TOKENS_ATTENDED = tl.constexpr(TOTALS.index("tokens_attended"))
_TOKENS_DENSE = tl.constexpr(TOTALS.index("tokens_dense"))
_SELECTIONS = tl.constexpr(TOTALS.index("selections"))
_REQUESTS = tl.constexpr(TOTALS.index("requests"))
_REQUESTS_SPARSE = tl.constexpr(TOTALS.index("requests_sparse"))
_TOKENS_SHARED = tl.constexpr(TOTALS.index("tokens_shared"))
_ROWS_GROUPED = tl.constexpr(TOTALS.index("rows_grouped"))
_WARM_STARTS = tl.constexpr(TOTALS.index("warm_starts"))


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
def count_decode_step_kernel(
    totals_ptr,
    seen_ptr,
    sparse_rows_ptr,
    rows_ptr,
    generations_ptr,
    seq_lens_ptr,
    actions_ptr,
    already_read_ptr,
    innermost_ptr,
    set_already_read_ptr,
    set_counts_ptr,
    batch,
    budget,
    num_layers,
    sparse_layers,
    selection_layers,
    early_layers,
    grouped_layers,
    ACTIONS: tl.constexpr,
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
    sparse = (lens > budget) & ((sparse_layers > 0) | ACTIONS)
    current = tl.load(generations_ptr + rows, mask=real, other=0)
    new = (tl.load(seen_ptr + rows, mask=real, other=0) != current) & real
    before = (tl.load(sparse_rows_ptr + rows, mask=real, other=0) != 0) & (new == 0)
    sets = tl.minimum(lens, budget)
    if SETS:
        sets = tl.where(real, tl.load(set_counts_ptr + items, mask=items < batch, other=0).to(tl.int64), 0)
    attended = (num_layers - sparse_layers) * lens + sparse_layers * sets
    selecting = sparse
    if ACTIONS:
        actions = tl.load(actions_ptr + items, mask=items < batch, other=0).to(tl.int32)
        selecting = sparse & ((actions & _SELECT) != 0)
        attended -= tl.where(sparse & ((actions & _SELECT) == 0), selection_layers * (lens - budget), 0)
        attended -= tl.where(sparse & ((actions & _EARLY) != 0), early_layers * (lens - budget), 0)
        add(totals_ptr, _WARM_STARTS, tl.sum((sparse & ((actions & _RECALL) != 0)).to(tl.int64), axis=0))

    add(totals_ptr, _DECODE_STEPS, tl.max(real.to(tl.int64), axis=0))
    add(totals_ptr, _TOKENS_ATTENDED, tl.sum(attended, axis=0))
    add(totals_ptr, _TOKENS_DENSE, num_layers * tl.sum(lens, axis=0))
    add(totals_ptr, _SELECTIONS, selection_layers * tl.sum(selecting.to(tl.int64), axis=0))
    add(totals_ptr, _REQUESTS, tl.sum(new.to(tl.int64), axis=0))
    add(totals_ptr, _REQUESTS_SPARSE, tl.sum((sparse & (before == 0)).to(tl.int64), axis=0))
    if GROUPS:
        already_read = tl.load(already_read_ptr + items, mask=items < batch, other=0).to(tl.int64)
        innermost = tl.load(innermost_ptr + items, mask=items < batch, other=-1)
        shared = grouped_layers * tl.sum(already_read, axis=0)
        if SETS:
            already_read = tl.load(set_already_read_ptr + items, mask=items < batch, other=0).to(tl.int64)
            shared += sparse_layers * tl.sum(already_read, axis=0)
        add(totals_ptr, _TOKENS_SHARED, shared)
        add(totals_ptr, _ROWS_GROUPED, tl.sum((innermost >= 0).to(tl.int64), axis=0))
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
    add(totals_ptr, _TOKENS_ATTENDED, -((short + HEADS - 1) // HEADS))


def count_decode_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    num_layers: int,
    sparse_layers: int,
    selection_layers: int,
    actions: Tensor | None,
    early_layers: int,
    groups: PrefixGroups | None,
    grouped_layers: int,
    set_groups: PrefixGroups | None,
    set_counts: Tensor | None,
) -> None:
    """See `api.count_decode_step`."""
    count_decode_step_kernel[(1,)](
        totals_ptr=ledger.totals,
        seen_ptr=ledger.seen,
        sparse_rows_ptr=ledger.sparse,
        rows_ptr=rows,
        generations_ptr=generations,
        seq_lens_ptr=seq_lens,
        actions_ptr=actions,
        already_read_ptr=None if groups is None else groups.already_read,
        innermost_ptr=None if groups is None else groups.innermost,
        set_already_read_ptr=None if set_groups is None else set_groups.already_read,
        set_counts_ptr=set_counts,
        batch=len(rows),
        budget=budget,
        num_layers=num_layers,
        sparse_layers=sparse_layers,
        selection_layers=selection_layers,
        early_layers=early_layers,
        grouped_layers=grouped_layers,
        ACTIONS=actions is not None,
        GROUPS=groups is not None,
        SETS=set_counts is not None,
        BLOCK_ROWS=plan_block(len(rows)),
        num_warps=4,
    )


def count_sets(ledger: Ledger, rows: Tensor, seq_lens: Tensor, set_counts: Tensor, *, budget: int, layers: int) -> None:
    """See `api.count_sets`."""
    heads = 1 if set_counts.dim() == 1 else set_counts.shape[1]
    count_sets_kernel[(1,)](
        totals_ptr=ledger.totals,
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
