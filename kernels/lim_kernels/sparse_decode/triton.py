"""Sparse decode in Triton: split over the set, then merged."""

from torch import Tensor

from lim_kernels.operands import Scaling
from lim_kernels.split_decode import Launch, split_decode


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    counts: Tensor,
    scaling: Scaling,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """See `api.sparse_decode`; `launch` overrides the launch table."""
    return split_decode(q, k_cache, v_cache, slots, counts, scaling, launch=launch)
