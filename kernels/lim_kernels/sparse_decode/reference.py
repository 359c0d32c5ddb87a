"""Specification of sparse decode in plain torch, on any device, without a host synchronisation."""

from torch import Tensor

from lim_kernels.attention import attend, gather_slots, valid_slots


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, counts: Tensor, *, scale: float, logit_cap: float
) -> tuple[Tensor, Tensor]:
    """See `api.sparse_decode`."""
    valid, safe = valid_slots(slots, counts)
    out, lse, _ = attend(
        q, gather_slots(k_cache, safe), gather_slots(v_cache, safe), valid, scale=scale, logit_cap=logit_cap
    )
    return out, lse
