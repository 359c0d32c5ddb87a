"""One-token attention over gathered keys and values, the arithmetic that every reference shares."""

import torch
from torch import Tensor


def gather_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of a KV cache by slot.

    Args:
        cache: [num_slots, H_kv, D].
        slots: int64 [B, K], or [B, H_kv, K] for one set per KV head.

    Returns:
        [B, H_kv, K, D] (a view where `slots` is [B, K]).
    """
    # fp8 has no index kernels in torch, its bytes do.
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    if slots.dim() == 2:
        gathered = stored.index_select(0, slots.reshape(-1)).view(*slots.shape, *cache.shape[1:]).transpose(1, 2)
    else:
        heads = torch.arange(cache.shape[1], device=cache.device).view(1, -1, 1)
        gathered = stored[slots, heads]
    return gathered.view(cache.dtype) if cache.element_size() == 1 else gathered


def attend(
    q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, *, scale: float, logit_cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of one query token a row, in float32 (float64 for float64 operands).

    Args:
        q: [B, H, D].
        keys, values: [B, H_kv, K, D], [B, H_kv, K, D_v].
        valid: bool [B, K] or [B, H_kv, K]; at least one entry true in every row.
        scale, logit_cap: as in `sparse_decode`.

    Returns:
        out [B, H, D_v] in q's dtype; lse [B, H] and logits [B, H, K] in the arithmetic's dtype. `logits` are the
        scaled (and capped) ones, before masking.
    """
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    # [B, H_kv, G, K]
    logits = (q.view(batch, kv_heads, group, dim).to(compute) * scale) @ keys.to(compute).transpose(2, 3)
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    mask = valid.view(batch, -1, 1, valid.shape[-1])
    masked = logits.masked_fill(~mask, float("-inf"))
    lse = masked.logsumexp(dim=3)
    weights = (masked - lse.unsqueeze(3)).exp()
    # A slot that is not valid may hold NaN, and 0 · NaN is NaN.
    values = values.to(compute).masked_fill(~mask.transpose(2, 3), 0.0)
    out = weights @ values
    return out.reshape(batch, heads, -1).to(q.dtype), lse.reshape(batch, heads), logits.reshape(batch, heads, -1)
