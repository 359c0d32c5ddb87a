"""Operands of decode tests, and the error that their precision allows."""

import torch
from torch import Tensor

import oracle


def operands(heads, kv_heads, dim, dim_v, dtype, *, device, batch=3, num_slots=97, cache_dtype=None, seed=0):
    """Random operands, drawn in their own dtype; slot 0 is poisoned, because no valid slot of a test names it.

    Returns:
        q [batch, heads, dim]; k and v [num_slots, kv_heads, ·] in `cache_dtype` or `dtype`; the CPU generator used.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, dim, generator=generator).to(dtype)
    k = torch.randn(num_slots, kv_heads, dim, generator=generator)
    v = torch.randn(num_slots, kv_heads, dim_v, generator=generator)
    k[0], v[0] = float("nan"), float("nan")
    return q.to(device), k.to(cache_dtype or dtype).to(device), v.to(cache_dtype or dtype).to(device), generator


def draw_slots(shape, counts: Tensor, num_slots: int, generator: torch.Generator, *, device) -> Tensor:
    """Distinct int32 slots [*shape] without slot 0; entries at or beyond `counts` name slot 0, or no slot at all.

    Args:
        shape: [B, K] or [B, H_kv, K], K < num_slots.
        counts: valid entries of each set, in the shape of the leading dimensions.
    """
    slots = torch.rand(*shape[:-1], num_slots - 1, generator=generator).argsort(-1)[..., : shape[-1]] + 1
    unused = torch.arange(shape[-1]) >= counts.cpu().unsqueeze(-1)
    poison = torch.where(torch.arange(shape[0]) % 2 == 0, 0, -1).view(-1, *[1] * (len(shape) - 1))
    return torch.where(unused, poison, slots).int().to(device)


def eager_attention(q, keys, values, scale, logit_cap=0.0):
    """`oracle.attention` in the operands' own precision."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys, values))
    logits = (keys @ q.unsqueeze(2)).squeeze(2) * scale
    if logit_cap:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    return (logits.softmax(1).unsqueeze(1) @ values).squeeze(1)


def assert_close_to_exact(out, exact, lowest, dtype, spare=0.0):
    """Error against float64 within twice the low-precision eager computation's, plus a rounding band and `spare`."""
    band = torch.finfo(dtype).eps * exact.abs().max() + spare
    assert (out.double() - exact).abs().max() <= 2 * (lowest.double() - exact).abs().max() + band


def rounding(values):
    """What float32 weights that are off by a few units in the last place do to their mean of `values`."""
    return 4 * torch.finfo(torch.float32).eps * values.double().abs().max()


def assert_attends(out, lse, q, keys, values, *, scale, logit_cap=0.0, k_scale=1.0, v_scale=1.0):
    """One row's results [H, D_v], [H] are attention over [K, H_kv, ·] keys and values, within what q's dtype allows."""
    scale = scale * k_scale
    exact, exact_lse = oracle.attention(q, keys, values, scale=scale, logit_cap=logit_cap)
    eager = eager_attention(q, keys.to(q.dtype), values.to(q.dtype), scale, logit_cap)
    assert_close_to_exact(out, exact * v_scale, eager * v_scale, q.dtype, rounding(values) * v_scale)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
