"""Public entry of sparse decode: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.dispatch import check_decode_operands, implementation_of, require, require_rows
from lim_kernels.operands import Scaling
from lim_kernels.sparse_decode import reference


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token a row over the KV slots in `slots`.

    Args:
        q: [B, H, D], a floating dtype.
        k_cache, v_cache: [num_slots, H_kv, D] and [num_slots, H_kv, D_v]; H is a multiple of H_kv and query head h
            reads KV head h // (H / H_kv).
        slots: int32 or int64 [B, K], or [B, H_kv, K] for one set per KV head; entries at or beyond `counts[b]` are
            never read and may hold anything.
        counts: int32 or int64 [B] or [B, H_kv], how many leading entries of `slots` are valid, each >= 1.
        scale: factor on q·k.
        logit_cap: c > 0 turns a scaled logit x into c·tanh(x / c); 0 leaves it.
        k_scale, v_scale: what a stored key or value is multiplied by, for quantised caches.

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H], natural logarithm of the softmax denominator.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "sparse_decode"
    check_decode_operands(op, q, k_cache, v_cache, slots, counts)
    batch, kv_heads = q.shape[0], k_cache.shape[1]
    require(
        slots.dim() in (2, 3) and slots.shape[0] == batch and (slots.dim() == 2 or slots.shape[1] == kv_heads),
        op,
        f"slots [{batch}, K] or [{batch}, {kv_heads}, K]",
        list(slots.shape),
    )
    require(
        counts.shape == slots.shape[:1] or counts.shape == slots.shape[:-1],
        op,
        f"counts {list(slots.shape[:-1])}",
        list(counts.shape),
    )
    require(not slots.is_floating_point() and not counts.is_floating_point(), op, "integer slots", slots.dtype)
    require_rows(op, slots)
    decode = implementation_of(reference.sparse_decode, implementation, q)
    return decode(
        q,
        k_cache,
        v_cache,
        slots,
        counts,
        Scaling(scale, logit_cap, k_scale, v_scale),
    )
