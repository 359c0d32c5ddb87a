"""Public entry of decode with scores: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.decode_with_scores import reference
from lim_kernels.dispatch import check_decode_operands, implementation_of, require, require_rows
from lim_kernels.operands import Scaling


def decode_with_scores(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    score_beyond: int = 0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query token a row over its whole context, and the logits it is made of.

    Args:
        q: [B, H, D], a floating dtype.
        k_cache, v_cache: [num_slots, H_kv, D] and [num_slots, H_kv, D_v].
        slots: int32 or int64 [B, L], KV slot of each position; entries at or beyond `seq_lens[b]` are never read.
        seq_lens: int32 or int64 [B], each 1 … L, the current token included.
        scaling: of this layer.
        score_beyond: rows of at most so many tokens need no logits, and may get none.

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H], natural logarithm; logits float32 [B, H, L], scaled (and
        capped), undefined at or beyond `seq_lens[b]` and in rows of at most `score_beyond` tokens.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "decode_with_scores"
    check_decode_operands(op, q, k_cache, v_cache, slots, seq_lens)
    batch = q.shape[0]
    require(slots.dim() == 2 and slots.shape[0] == batch, op, f"slots [{batch}, L]", list(slots.shape))
    require(seq_lens.shape == slots.shape[:1], op, f"seq_lens [{batch}]", list(seq_lens.shape))
    require_rows(op, slots)
    decode = implementation_of(reference.decode_with_scores, implementation, q)
    return decode(
        q,
        k_cache,
        v_cache,
        slots,
        seq_lens,
        scaling,
        score_beyond=score_beyond,
    )
