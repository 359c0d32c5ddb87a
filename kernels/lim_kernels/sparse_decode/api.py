"""Public entry of sparse decode: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.dispatch import require, resolve
from lim_kernels.sparse_decode import reference

_IMPLEMENTATIONS = ("reference",)


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
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

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H], natural logarithm of the softmax denominator.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "sparse_decode"
    require(q.dim() == 3 and q.is_floating_point(), op, "q floating [B, H, D]", f"{q.dtype} {list(q.shape)}")
    batch, heads, dim = q.shape
    require(
        k_cache.dim() == 3 and k_cache.shape[2] == dim and heads % k_cache.shape[1] == 0,
        op,
        f"k_cache [num_slots, H_kv, {dim}] with H_kv dividing {heads}",
        list(k_cache.shape),
    )
    kv_heads = k_cache.shape[1]
    require(
        v_cache.dim() == 3 and v_cache.shape[:2] == k_cache.shape[:2],
        op,
        f"v_cache [{k_cache.shape[0]}, {kv_heads}, D_v]",
        list(v_cache.shape),
    )
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
    devices = {str(t.device) for t in (q, k_cache, v_cache, slots, counts)}
    require(len(devices) == 1, op, "all operands on one device", sorted(devices))
    resolve(op, implementation, _IMPLEMENTATIONS, "reference")
    return reference.sparse_decode(q, k_cache, v_cache, slots, counts, scale=scale, logit_cap=logit_cap)
