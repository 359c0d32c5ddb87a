"""Decode with scores in Triton: keys and values are read once, and the logits are written on the way."""

from torch import Tensor

from lim_kernels.operands import Scaling
from lim_kernels.split_decode import Launch, split_decode
from lim_kernels.triton_support import padded_empty


def decode_with_scores(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    score_beyond: int,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.decode_with_scores`; `launch` overrides the launch table."""
    logits = padded_empty(q.shape[0], q.shape[1], slots.shape[1], device=q.device)
    out, lse = split_decode(
        q,
        k_cache,
        v_cache,
        slots,
        seq_lens,
        scaling,
        logits=logits,
        score_beyond=score_beyond,
        launch=launch,
    )
    return out, lse, logits
