"""One decode step's sparse attention, on tensors: what the layers of a step share, and what each role does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import decode_with_scores, find_prefix_groups, grouped_decode, sparse_decode
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods import Method, Role

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
    set_slots: Tensor | None = None  # int32 [B, K]: the set in force, filled by a selection layer
    set_counts: Tensor | None = None  # int32 [B]


def begin_step(method: Method, slots: Tensor, seq_lens: Tensor, granule: int | None = None) -> DecodeStep:
    """Start a step from a snapshot of the rows; a method whose set needs no scores has it at once.

    Args:
        granule: shared prefixes are found in multiples of so many tokens; None: they are not looked for.
    """
    step = DecodeStep(slots=slots, seq_lens=seq_lens)
    if granule is not None and len(seq_lens) > 1:
        step.groups = find_prefix_groups(slots, seq_lens, granule=granule)
    chosen = method.initial_set(seq_lens, slots.shape[1])
    if chosen is not None:
        positions, step.set_counts = chosen
        # No row has more tokens than the snapshot is wide, and a budget may be much wider.
        step.set_slots = slots.gather(1, positions[:, : slots.shape[1]].clamp(min=0).long())
    return step


@dataclass(frozen=True)
class HeadShare:
    """Which query heads this rank holds, and how its scores meet those of the other ranks."""

    first_head: int
    own_heads: int
    num_heads: int
    reduce: Reduce | None


@dataclass(frozen=True)
class Scales:
    """What a layer's logits and cached values are multiplied by."""

    scale: float
    logit_cap: float
    k_scale: float = 1.0
    v_scale: float = 1.0


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
) -> Tensor:
    """Attention of one layer; a selection layer also puts its set in force.

    Args:
        q: [B, H, D]; k_cache, v_cache: [num_slots, H_kv, D] and [num_slots, H_kv, D_v], current token stored.
        rows_at_once: how many rows a selection layer scores together, None for all: logits take 4·H·L bytes a row.

    Returns:
        [B, H, D_v] in q's dtype.

    Raises:
        RuntimeError: a sparse layer ran before any set was in force.
    """
    sizes = vars(scales)
    if role is Role.SPARSE:
        if step.set_slots is None or step.set_counts is None:
            raise RuntimeError("a sparse layer ran before a selection layer of the same step")
        return sparse_decode(q, k_cache, v_cache, step.set_slots, step.set_counts, **sizes)[0]
    if role is Role.DENSE or method.budget >= step.slots.shape[1]:
        # No row can exceed the budget: the set is the whole context, and nobody asks for logits.
        if role is Role.SELECT:
            step.set_slots, step.set_counts = step.slots, step.seq_lens
        if step.groups is not None:
            return grouped_decode(q, k_cache, v_cache, step.slots, step.seq_lens, step.groups, **sizes)[0]
        return sparse_decode(q, k_cache, v_cache, step.slots, step.seq_lens, **sizes)[0]
    batch = q.shape[0]
    rows_at_once = rows_at_once or batch
    parts = []
    for first in range(0, batch, rows_at_once):
        rows = slice(first, first + rows_at_once)
        slots, seq_lens = step.slots[rows], step.seq_lens[rows]
        operands = q[rows], k_cache, v_cache, slots, seq_lens
        if step.groups is not None and rows_at_once >= batch:
            out, lse, scored = grouped_decode(*operands, step.groups, scored=True, score_beyond=method.budget, **sizes)
            assert scored is not None
            logits = scored
            del scored
        else:
            # Groups may reach over the rows that fit together.
            out, lse, logits = decode_with_scores(*operands, score_beyond=method.budget, **sizes)
        scores = method.score(logits, seq_lens, lse=lse, first_head=heads.first_head, num_heads=heads.num_heads)
        # The logits' memory serves the next rows.
        del logits
        if heads.reduce is not None:
            scores = heads.reduce(scores, method.rank_reduction[method.aggregate])
        parts.append((out, *method.choose(scores, seq_lens, slots)))
    if len(parts) == 1:
        out, step.set_slots, step.set_counts = parts[0]
        return out
    out, step.set_slots, step.set_counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return out
