"""Specification of sparse decode in plain torch, on any device, without a host synchronisation."""

import torch
from torch import Tensor

from lim_kernels.attention import attend, gather_slots


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, counts: Tensor, *, scale: float, logit_cap: float
) -> tuple[Tensor, Tensor]:
    """See `api.sparse_decode`."""
    valid = torch.arange(slots.shape[-1], device=q.device) < counts.unsqueeze(-1).long()
    if valid.dim() < slots.dim():
        valid = valid.unsqueeze(1).expand(slots.shape)
    safe = slots.masked_fill(~valid, 0).long()
    out, lse, _ = attend(
        q,
        gather_slots(k_cache, safe),
        gather_slots(v_cache, safe),
        valid,
        scale=scale,
        logit_cap=logit_cap,
    )
    return out, lse
