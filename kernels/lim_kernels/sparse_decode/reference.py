"""Specification of sparse decode in plain torch, on any device, without a host synchronisation."""

from torch import Tensor

from lim_kernels.attention import attend


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    *,
    scale: float,
    logit_cap: float,
    k_scale: float,
    v_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `api.sparse_decode`."""
    out, lse, _ = attend(
        q, k_cache, v_cache, slots, counts, scale=scale, logit_cap=logit_cap, k_scale=k_scale, v_scale=v_scale
    )
    return out, lse
