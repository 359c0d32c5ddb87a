"""One decode step's sparse attention, on tensors: what the layers of a step share, and what each role does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import decode_with_scores, sparse_decode
from sgl_lim.methods import Method, Role

Reduce = Callable[[Tensor, str], Tensor]
"""Combines scores float32 [B, L] over the ranks of a tensor-parallel group, by "max" or "sum"."""


@dataclass
class DecodeStep:
    """Metadata of one decode step.

    `slots` is a copy: the scheduler may rewrite the request pool's rows while the step runs.
    """

    slots: Tensor  # int32 [B, L] on the pool's device: KV slot of each position
    seq_lens: Tensor  # int64 [B] on the pool's device, the current token included
    set_slots: Tensor | None = None  # int32 [B, min(K, L)]: the set in force, filled by a selection layer
    set_counts: Tensor | None = None  # int32 [B]

    def keep(self, positions: Tensor, counts: Tensor) -> None:
        """Put a set in force for the layers that follow: positions int32 [B, K] (-1 padded), counts int32 [B]."""
        # No row has more tokens than the snapshot is wide, and a budget may be much wider.
        positions = positions[:, : self.slots.shape[1]]
        self.set_slots = self.slots.gather(1, positions.clamp(min=0).long())
        self.set_counts = counts


def begin_step(method: Method, slots: Tensor, seq_lens: Tensor) -> DecodeStep:
    """Start a step from a snapshot of the rows; a method whose set needs no scores has it at once."""
    step = DecodeStep(slots=slots, seq_lens=seq_lens)
    chosen = method.initial_set(seq_lens, slots.shape[1])
    if chosen is not None:
        step.keep(*chosen)
    return step


@dataclass(frozen=True)
class HeadShare:
    """Which query heads this rank holds, and how its scores meet those of the other ranks."""

    first_head: int
    num_heads: int
    reduce: Reduce | None


def attend(
    method: Method,
    step: DecodeStep,
    role: Role,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: float,
    logit_cap: float,
    heads: HeadShare,
) -> Tensor:
    """Attention of one layer; a selection layer also puts its set in force.

    Args:
        q: [B, H, D]; k_cache, v_cache: [num_slots, H_kv, D] and [num_slots, H_kv, D_v], current token stored.

    Returns:
        [B, H, D_v] in q's dtype.

    Raises:
        RuntimeError: a sparse layer ran before any set was in force.
    """
    if role is Role.SPARSE:
        if step.set_slots is None or step.set_counts is None:
            raise RuntimeError("a sparse layer ran before a selection layer of the same step")
        return sparse_decode(q, k_cache, v_cache, step.set_slots, step.set_counts, scale=scale, logit_cap=logit_cap)[0]
    out, _, logits = decode_with_scores(
        q, k_cache, v_cache, step.slots, step.seq_lens, scale=scale, logit_cap=logit_cap
    )
    if role is Role.SELECT:
        scores = method.score(
            logits.to(torch.float32), step.seq_lens, first_head=heads.first_head, num_heads=heads.num_heads
        )
        if heads.reduce is not None:
            scores = heads.reduce(scores, method.rank_reduction[method.aggregate])
        step.keep(*method.choose(scores, step.seq_lens))
    return out
