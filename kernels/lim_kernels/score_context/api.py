"""Public entry of scoring a context: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.dispatch import check_decode_operands, implementation_of, require, require_rows
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.score_context import reference


def score_context(
    q: Tensor,
    k_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    groups: PrefixGroups | None = None,
    score_beyond: int = 0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What `decode_with_scores` gives beside attention. Keys are read once, values not at all.

    Args:
        q: [B, H, D], a floating dtype.
        k_cache: [num_slots, H_kv, D]; H is a multiple of H_kv and query head h reads KV head h // (H / H_kv).
        slots: int32 or int64 [B, L], KV slot of each position; entries at or beyond `seq_lens[b]` are never read.
        seq_lens: int32 or int64 [B], each 1 … L, the current token included.
        scaling: of this layer.
        groups: as in `grouped_decode`; their keys are read once for all rows. None: each row reads for itself.
        score_beyond: rows of at most so many tokens need no logits. Their keys are not read, but for those of a group
            that has other rows as well.

    Returns:
        lse float32 [B, H], natural logarithm of the softmax denominator; logits float32 [B, H, L], scaled (and
        capped), undefined at or beyond `seq_lens[b]`. Both are undefined in rows of at most `score_beyond` tokens;
        logits also where `groups` leave out a part of a row.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "score_context"
    check_decode_operands(op, q, k_cache, k_cache, slots, seq_lens)
    batch = q.shape[0]
    require(slots.dim() == 2 and slots.shape[0] == batch, op, f"slots [{batch}, L]", list(slots.shape))
    require(not slots.is_floating_point(), op, "integer slots", slots.dtype)
    require(seq_lens.shape == slots.shape[:1], op, f"seq_lens [{batch}]", list(seq_lens.shape))
    require_rows(op, slots)
    if groups is not None:
        require(groups.counts.shape == seq_lens.shape, op, f"groups of {batch} rows", list(groups.counts.shape))
    score = implementation_of(reference.score_context, implementation, q)
    return score(q, k_cache, slots, seq_lens, scaling, groups=groups, score_beyond=score_beyond)
