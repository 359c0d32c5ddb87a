"""Specification of decode with scores in plain torch, on any device, without a host synchronisation."""

from torch import Tensor

from lim_kernels.attention import attend
from lim_kernels.operands import Scaling


def decode_with_scores(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    score_beyond: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.decode_with_scores`; here every row gets its logits."""
    return attend(q, k_cache, v_cache, slots, seq_lens, scaling)
