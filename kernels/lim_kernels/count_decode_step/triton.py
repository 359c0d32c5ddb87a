"""Step accounting in Triton: one program, because a step's rows are few and its launches dear."""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels import row_actions
from lim_kernels.count_decode_step.ledger import STEPS, TOTALS, Layers, Ledger, Sharing
from lim_kernels.triton_support import plan_block

_SELECT = tl.constexpr(row_actions.SELECT)
_RECALL = tl.constexpr(row_actions.RECALL)
_EARLY = tl.constexpr(row_actions.EARLY)
_TOTALS = tl.constexpr(len(TOTALS))
_DECODE_STEPS = tl.constexpr(STEPS)
_TOKENS_ATTENDED = tl.constexpr(TOTALS.index("tokens_attended"))
_TOKENS_SCORED = tl.constexpr(TOTALS.index("tokens_scored"))
_TOKENS_DENSE = tl.constexpr(TOTALS.index("tokens_dense"))
_SELECTIONS = tl.constexpr(TOTALS.index("selections"))
_REQUESTS = tl.constexpr(TOTALS.index("requests"))
_REQUESTS_SPARSE = tl.constexpr(TOTALS.index("requests_sparse"))
_TOKENS_SHARED = tl.constexpr(TOTALS.index("tokens_shared"))
_ROWS_GROUPED = tl.constexpr(TOTALS.index("rows_grouped"))
_WARM_STARTS = tl.constexpr(TOTALS.index("warm_starts"))
_DRAFT_TOKENS_ATTENDED = tl.constexpr(TOTALS.index("draft_tokens_attended"))


@triton.jit(
    do_not_specialize=[
        "batch",
        "budget",
        "all_layers",
        "sparse_layers",
        "selecting_layers",
        "scoring_layers",
        "early_layers",
        "grouped_layers",
    ]
)
def count_decode_step_kernel(
    totals_ptr,
    pending_ptr,
    steps_ptr,
    amounts_ptr,
    last_steps_ptr,
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
    all_layers,
    sparse_layers,
    selecting_layers,
    scoring_layers,
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
    lens = tl.load(seq_lens_ptr + items, mask=real, other=0).to(tl.int64)
    # Where sets outlive a step or are scored for, selection layers may be sparse too.
    sparse = (lens > budget) & ((sparse_layers > 0) | (scoring_layers > 0) | ACTIONS)
    current = tl.load(generations_ptr + rows, mask=real, other=0)
    new = (tl.load(seen_ptr + rows, mask=real, other=0) != current) & real
    before = (tl.load(sparse_rows_ptr + rows, mask=real, other=0) != 0) & (new == 0)
    sets = tl.minimum(lens, budget)
    if SETS:
        sets = tl.load(set_counts_ptr + items, mask=real, other=0).to(tl.int64)
    attended = (all_layers - sparse_layers) * lens + sparse_layers * sets
    selecting, recalling = sparse, tl.zeros_like(sparse)
    if ACTIONS:
        actions = tl.load(actions_ptr + items, mask=real, other=0).to(tl.int32)
        selecting = sparse & ((actions & _SELECT) != 0)
        recalling = sparse & ((actions & _RECALL) != 0)
        attended -= tl.where(sparse & ((actions & _SELECT) == 0), selecting_layers * (lens - budget), 0)
        attended -= tl.where(sparse & ((actions & _EARLY) != 0), early_layers * (lens - budget), 0)
    attended -= tl.where(selecting, scoring_layers * (lens - sets), 0)
    shared, grouped = tl.zeros_like(lens), tl.zeros_like(real)
    if GROUPS:
        shared = grouped_layers * tl.load(already_read_ptr + items, mask=real, other=0).to(tl.int64)
        grouped = tl.load(innermost_ptr + items, mask=real, other=-1) >= 0
        if SETS:
            in_sets = tl.load(set_already_read_ptr + items, mask=real, other=0).to(tl.int64)
            shared += (sparse_layers + scoring_layers) * in_sets

    step = tl.load(steps_ptr)
    pending_ptr += step % 2 * _TOTALS
    amounts_ptr += rows * _TOTALS
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _DECODE_STEPS, real)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _TOKENS_ATTENDED, attended)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _TOKENS_SCORED, tl.where(selecting, scoring_layers * lens, 0))
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _TOKENS_DENSE, all_layers * lens)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _SELECTIONS, tl.where(selecting, selecting_layers, 0))
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _REQUESTS, new)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _REQUESTS_SPARSE, sparse & (before == 0))
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _TOKENS_SHARED, shared)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _ROWS_GROUPED, grouped)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _WARM_STARTS, recalling)
    enter(totals_ptr, pending_ptr, amounts_ptr, real, _DRAFT_TOKENS_ATTENDED, tl.zeros_like(lens))
    tl.store(last_steps_ptr + rows, step, mask=real)
    tl.store(steps_ptr, step + 1)
    tl.store(seen_ptr + rows, current, mask=real)
    tl.store(sparse_rows_ptr + rows, (before | sparse).to(tl.uint8), mask=real)


@triton.jit
def enter(totals_ptr, pending_ptr, amounts_ptr, real, index: tl.constexpr, amounts):
    """Take what is pending into one total, and leave the rows' amounts pending in its place; no other program does."""
    done = tl.load(pending_ptr + index)
    if index == _DECODE_STEPS:
        done = tl.minimum(done, 1)
    tl.store(totals_ptr + index, tl.load(totals_ptr + index) + done)
    amounts = amounts.to(tl.int64)
    tl.store(pending_ptr + index, tl.sum(amounts, axis=0))
    tl.store(amounts_ptr + index, amounts, mask=real)


@triton.jit(do_not_specialize=["batch", "budget", "layers"])
def count_sets_kernel(
    pending_ptr,
    steps_ptr,
    amounts_ptr,
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
    """Take off by how much each row's sets are short of the budget."""
    items = tl.arange(0, BLOCK_ROWS)
    heads = tl.arange(0, BLOCK_HEADS)
    rows = tl.load(rows_ptr + items, mask=items < batch, other=0).to(tl.int64)
    real = rows != 0
    sets = tl.minimum(tl.load(seq_lens_ptr + items, mask=real, other=0).to(tl.int64), budget)
    # [BLOCK_ROWS, BLOCK_HEADS]
    there = real[:, None] & (heads < HEADS)[None, :]
    counts = tl.load(set_counts_ptr + items[:, None] * HEADS + heads[None, :], mask=there, other=0).to(tl.int64)
    short = layers * (HEADS * sets - tl.sum(counts, axis=1))
    # Rounded up, as division of integers goes towards zero: what is left is rounded down.
    short = (short + HEADS - 1) // HEADS
    amounts_ptr += rows * _TOTALS + _TOKENS_ATTENDED
    tl.store(amounts_ptr, tl.load(amounts_ptr, mask=real, other=0) - short, mask=real)
    pending_ptr += (tl.load(steps_ptr) + 1) % 2 * _TOTALS + _TOKENS_ATTENDED
    tl.store(pending_ptr, tl.load(pending_ptr) - tl.sum(short, axis=0))


def count_decode_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    layers: Layers,
    *,
    budget: int,
    actions: Tensor | None,
    sharing: Sharing | None,
) -> None:
    """See `api.count_decode_step`."""
    groups = None if sharing is None else sharing.groups
    in_sets = None if sharing is None else sharing.in_sets
    set_counts = None if sharing is None else sharing.set_counts
    count_decode_step_kernel[(1,)](
        totals_ptr=ledger.totals,
        pending_ptr=ledger.pending,
        steps_ptr=ledger.steps,
        amounts_ptr=ledger.amounts,
        last_steps_ptr=ledger.last_steps,
        seen_ptr=ledger.seen,
        sparse_rows_ptr=ledger.sparse,
        rows_ptr=rows,
        generations_ptr=generations,
        seq_lens_ptr=seq_lens,
        actions_ptr=actions,
        already_read_ptr=None if groups is None else groups.already_read,
        innermost_ptr=None if groups is None else groups.innermost,
        set_already_read_ptr=None if in_sets is None else in_sets.already_read,
        set_counts_ptr=set_counts,
        batch=len(rows),
        budget=budget,
        all_layers=layers.all,
        sparse_layers=layers.sparse,
        selecting_layers=layers.selecting,
        scoring_layers=layers.scoring,
        early_layers=layers.early,
        grouped_layers=0 if sharing is None else sharing.layers,
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
        pending_ptr=ledger.pending,
        steps_ptr=ledger.steps,
        amounts_ptr=ledger.amounts,
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
