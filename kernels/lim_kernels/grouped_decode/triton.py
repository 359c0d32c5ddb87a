"""Grouped decode in Triton: what groups share is read once, and the logits are written on the way."""

from torch import Tensor

from lim_kernels.group_decode import Tile, group_decode
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.split_decode import Launch
from lim_kernels.triton_support import padded_empty


def grouped_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    scaling: Scaling,
    *,
    scored: bool,
    score_beyond: int,
    launch: Launch | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `api.grouped_decode`; `launch` and `tile` override the launch tables."""
    logits = padded_empty(q.shape[0], q.shape[1], slots.shape[1], device=q.device) if scored else None
    out, lse = group_decode(
        q,
        k_cache,
        v_cache,
        slots,
        seq_lens,
        groups,
        scaling,
        logits=logits,
        score_beyond=score_beyond,
        launch=launch,
        tile=tile,
    )
    return out, lse, logits
