"""One-token attention over gathered keys and values, the arithmetic that the torch implementations share."""

import torch
from torch import Tensor

from lim_kernels.operands import Scaling


def valid_slots(slots: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of `slots` count, and a copy in which the others repeat the row's first slot.

    A padded slot must name memory that holds numbers: a weight of zero does not hide NaN.

    Args:
        slots: integer [B, K] or [B, H_kv, K]; counts: integer [B] or [B, H_kv], each >= 1.

    Returns:
        bool and int64 tensors in the shape of `slots`.
    """
    counts = counts.unsqueeze(-1)
    if counts.dim() < slots.dim():
        counts = counts.unsqueeze(1)
    valid = torch.arange(slots.shape[-1], device=slots.device) < counts
    return valid.expand(slots.shape), torch.where(valid, slots, slots[..., :1]).long()


def gather_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of a KV cache by slot, contiguous, KV head by KV head.

    Args:
        cache: [num_slots, H_kv, D], contiguous.
        slots: int64 [B, K], or [B, H_kv, K] for one set per KV head.

    Returns:
        [B, H_kv, K, D].
    """
    kv_heads, dim = cache.shape[1:]
    heads = torch.arange(kv_heads, device=cache.device).view(1, -1, 1)
    per_head = slots.unsqueeze(1) if slots.dim() == 2 else slots
    rows = (per_head * kv_heads + heads).reshape(-1)
    # fp8 has no index kernels in torch, its bytes do.
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    gathered = stored.view(-1, dim).index_select(0, rows).view(cache.dtype)
    return gathered.view(slots.shape[0], kv_heads, -1, dim)


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """[B, H, D] as [B, H_kv, H / H_kv, D]."""
    return q.unflatten(1, (kv_heads, -1))


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    scaling: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of one query token a row over KV slots, in float32 (float64 for float64 operands).

    Args:
        q: [B, H, D].
        k_cache, v_cache: [num_slots, H_kv, D], [num_slots, H_kv, D_v].
        slots, counts: as in `valid_slots`.
        scaling: of this layer.

    Returns:
        out [B, H, D_v] in q's dtype; lse [B, H] and logits [B, H, K] in the arithmetic's dtype. `logits` are the
        scaled (and capped) ones, -inf beyond `counts`.
    """
    valid, safe = valid_slots(slots, counts)
    # Keys are let go before values are gathered: on a CPU fresh memory costs as much as the arithmetic.
    logits = scaled_logits(q, k_cache, safe, scaling)
    logits.masked_fill_(~valid.view(valid.shape[0], -1, 1, valid.shape[-1]), float("-inf"))
    lse = logits.logsumexp(dim=3)
    out = (logits - lse.unsqueeze(3)).exp_() @ gather_slots(v_cache, safe).to(logits.dtype)
    if scaling.v_scale != 1.0:
        out = out * scaling.v_scale
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2), logits.flatten(1, 2)


def attend_within(q: Tensor, k_cache: Tensor, v_cache: Tensor, run: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Causal attention of tokens to themselves and those before them in a short run; waits for nothing.

    Args:
        q: [B, H_kv * T * G, D], of each KV head the queries of T tokens.
        k_cache, v_cache: [num_slots, H_kv, D], [num_slots, H_kv, D_v].
        run: int64 [B, T], KV slots of the tokens.
        scaling: of this layer.

    Returns:
        out [B, H_kv * T * G, D_v] and lse [B, H_kv * T * G] in the arithmetic's dtype.
    """
    tokens = run.shape[1]
    # [B, H_kv, T * G, T]
    logits = scaled_logits(q, k_cache, run, scaling)
    of_query = torch.arange(tokens, device=q.device).repeat_interleave(logits.shape[2] // tokens)
    later = torch.arange(tokens, device=q.device) > of_query.unsqueeze(1)
    logits = logits.masked_fill(later, float("-inf"))
    lse = logits.logsumexp(dim=3)
    out = (logits - lse.unsqueeze(3)).exp() @ gather_slots(v_cache, run).to(logits.dtype) * scaling.v_scale
    return out.flatten(1, 2), lse.flatten(1, 2)


def scaled_logits(q: Tensor, k_cache: Tensor, slots: Tensor, scaling: Scaling) -> Tensor:
    """Scaled (and capped) logits [B, H_kv, H / H_kv, K] of q [B, H, D] by the keys of int64 slots, as `gather_slots`.

    In float32, or float64 for a q of float64.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = group_queries(q, k_cache.shape[1]).to(compute) * (scaling.scale * scaling.k_scale)
    logits = queries @ gather_slots(k_cache, slots).to(compute).transpose(2, 3)
    return logits.div_(scaling.logit_cap).tanh_().mul_(scaling.logit_cap) if scaling.logit_cap > 0 else logits


def as_one_row(q: Tensor, kv_heads: int) -> Tensor:
    """Queries [rows, H, D] as the heads [1, H_kv * rows * G, D] of one row, so that all of them meet its slots."""
    return q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 2).unsqueeze(0)


def as_rows(result: Tensor, rows: int, kv_heads: int) -> Tensor:
    """What came of `as_one_row`, [1, H_kv * rows * G, …], as [rows, H, …]."""
    return result[0].unflatten(0, (kv_heads, rows, -1)).transpose(0, 1).flatten(1, 2)
