"""Specification of sparse decode in plain torch, on any device, without a host synchronisation."""

from torch import Tensor

from lim_kernels.attention import attend
from lim_kernels.operands import Scaling


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """See `api.sparse_decode`."""
    out, lse, _ = attend(q, k_cache, v_cache, slots, counts, scaling)
    return out, lse
