"""One decode step's sparse attention, on tensors: what the layers of a step share, and what each role does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import Scaling, decode_with_scores, find_prefix_groups, grouped_decode, sparse_decode
from lim_kernels.page_bounds import PageBounds
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods import Method, Role, SharedSets
from sgl_lim.serving.set_store import Reuse, SetStore, read

Reduce = Callable[[Tensor, str], Tensor]
"""Combines scores float32 [B, L] over the ranks of a tensor-parallel group, by "max" or "logsumexp"."""


@dataclass
class DecodeStep:
    """Metadata of one decode step.

    `slots` is a copy: the scheduler may rewrite the request pool's rows while the step runs.
    """

    slots: Tensor  # int32 [B, L] on the pool's device: KV slot of each position
    seq_lens: Tensor  # int32 [B] on the pool's device, the current token included
    groups: PrefixGroups | None = None
    """Which rows share leading slots, where full layers are to read them once."""
    shared: SharedSets | None = None
    """Which rows choose what they share together, where not each for itself."""
    reuse: Reuse | None = None
    """Which rows select in this step, where not all do."""
    set_slots: Tensor | None = None  # int32 [B, K] or [B, H_kv, K]: the set in force, filled by the layer that chose it
    set_counts: Tensor | None = None  # int32 [B] or [B, H_kv]


def begin_step(method: Method, slots: Tensor, seq_lens: Tensor, granule: int | None = None) -> DecodeStep:
    """Start a step from a snapshot of the rows; a method whose set needs no scores has it at once.

    Args:
        granule: shared prefixes are found in multiples of so many tokens; None: they are not looked for.
    """
    step = DecodeStep(slots=slots, seq_lens=seq_lens)
    if granule is not None and len(seq_lens) > 1:
        step.groups = find_prefix_groups(slots, seq_lens, granule=granule)
        step.shared = method.share_sets(slots, seq_lens, granule)
    chosen = method.initial_set(seq_lens, slots.shape[1])
    if chosen is not None:
        positions, step.set_counts = chosen
        step.set_slots = slots.gather(1, positions.clamp(min=0).long())
    return step


@dataclass(frozen=True)
class HeadShare:
    """Which query heads this rank holds, and how its scores meet those of the other ranks."""

    first_head: int
    own_heads: int
    num_heads: int
    reduce: Reduce | None


Scales = Scaling


def attend(
    method: Method,
    step: DecodeStep,
    role: Role,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scales: Scales,
    heads: HeadShare,
    rows_at_once: int | None = None,
    store: SetStore | None = None,
    bounds: PageBounds | None = None,
) -> Tensor:
    """Attention of one layer; a layer that chooses a set also puts it in force.

    Args:
        q: [B, H, D]; k_cache, v_cache: [num_slots, H_kv, D] and [num_slots, H_kv, D_v], current token stored.
        store: where sets outlive a step; needed if `step.reuse` is there.
        bounds: of the layer's pages, current token learnt; needed where the layer chooses for itself.
        rows_at_once: how many rows a selection layer scores together, None for all: logits take 4·H·L bytes a row.

    Returns:
        [B, H, D_v] in q's dtype.

    Raises:
        RuntimeError: a sparse layer ran before any set was in force, or a layer has no bounds to choose by.
    """
    if role is Role.SPARSE:
        if step.set_slots is None or step.set_counts is None:
            raise RuntimeError("a sparse layer ran before a selection layer of the same step")
        operands = q, k_cache, v_cache, step.set_slots, step.set_counts
        if step.shared is not None:
            return grouped_decode(*operands, step.shared.in_sets, scales)[0]
        return sparse_decode(*operands, **vars(scales))[0]
    if role is Role.OWN and method.budget < step.slots.shape[1]:
        if bounds is None:
            raise RuntimeError(f"method {method.name} chooses by the bounds of pages, and none were given")
        step.set_slots, step.set_counts = method.choose_own(q, bounds, step.slots, step.seq_lens)
        return sparse_decode(q, k_cache, v_cache, step.set_slots, step.set_counts, **vars(scales))[0]
    if role is Role.DENSE or method.budget >= step.slots.shape[1]:
        # No row can exceed the budget: the set is the whole context, and nobody asks for logits.
        if role is not Role.DENSE:
            step.set_slots, step.set_counts = step.slots, step.seq_lens
        early = None if step.reuse is None else step.reuse.early
        if role is Role.DENSE and step.reuse is not None and early is not None:
            return grouped_decode(q, k_cache, v_cache, step.reuse.extended, early.ends, early.groups, scales)[0]
        if step.groups is not None:
            return grouped_decode(q, k_cache, v_cache, step.slots, step.seq_lens, step.groups, scales)[0]
        return sparse_decode(q, k_cache, v_cache, step.slots, step.seq_lens, **vars(scales))[0]
    batch = q.shape[0]
    rows_at_once = rows_at_once or batch
    # Rows that do not select have nothing to choose.
    lens = step.seq_lens if step.reuse is None else step.reuse.choose_lens
    outs, parts = [], []
    for first in range(0, batch, rows_at_once):
        rows = slice(first, first + rows_at_once)
        # Groups may reach over the rows that fit together.
        grouped = rows_at_once >= batch
        out, lse, logits = attend_and_score(method, step, q[rows], k_cache, v_cache, rows, grouped, scales)
        scores = method.score(
            logits,
            lens[rows],
            lse=lse,
            kv_heads=k_cache.shape[1],
            first_head=heads.first_head,
            num_heads=heads.num_heads,
        )
        # The logits' memory serves the next rows.
        del logits
        if heads.reduce is not None and not method.per_kv_head:
            scores = heads.reduce(scores, method.rank_reduction[method.aggregate])
        outs.append(out)
        parts.append(scores)
    # Rows that choose together need not have been scored together, and scores are few beside logits.
    out, scores = (tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in (outs, parts))
    # Sets that outlive the step are kept in positions.
    kept = step.reuse is not None and store is not None and store.keeps(step.reuse)
    chosen, counts = method.choose(scores, lens, None if kept else step.slots, step.shared)
    if kept:
        assert step.reuse is not None and store is not None
        chosen, counts = store.keep(step.reuse, chosen, step.seq_lens)
    step.set_slots, step.set_counts = chosen, counts
    return out


def attend_and_score(
    method: Method,
    step: DecodeStep,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: slice,
    grouped: bool,
    scales: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    """A selection layer's attention for some rows: out, lse, and logits [b, H, L] of the rows that select.

    Args:
        q: [b, H, D] of these rows; grouped: whether they are the whole batch, so that its prefix groups can be used.
    """
    budget, reuse, lead = method.budget, step.reuse, 0
    slots, seq_lens, groups = step.slots[rows], step.seq_lens[rows], step.groups if grouped else None
    reading = None if reuse is None else reuse.selecting
    if reuse is not None and reading is not None:
        # One call for both kinds of rows: those that do not select attend to the set before their slots.
        if not grouped:
            reading = read(slots, seq_lens, reading.apart[rows], reading.ends[rows], None, budget)
        lead, slots, seq_lens, groups = budget, reuse.extended[rows], reading.ends, reading.groups
    if groups is None:
        return decode_with_scores(q, k_cache, v_cache, slots, seq_lens, scales, score_beyond=budget)
    operands = q, k_cache, v_cache, slots, seq_lens, groups
    out, lse, logits = grouped_decode(*operands, scales, scored=True, score_beyond=lead + budget)
    assert logits is not None
    return out, lse, logits[:, :, lead:]
