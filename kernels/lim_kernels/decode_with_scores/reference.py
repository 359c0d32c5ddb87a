"""Specification of decode with scores in plain torch, on any device, without a host synchronisation."""

from torch import Tensor

from lim_kernels.attention import attend, gather_slots, valid_slots


def decode_with_scores(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, seq_lens: Tensor, *, scale: float, logit_cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.decode_with_scores`."""
    valid, safe = valid_slots(slots, seq_lens)
    return attend(q, gather_slots(k_cache, safe), gather_slots(v_cache, safe), valid, scale=scale, logit_cap=logit_cap)
