"""Scoring a context in Triton: the kernels of decode attention, over values of no width."""

from torch import Tensor

from lim_kernels.group_decode import Tile, group_decode
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.split_decode import Launch, split_decode
from lim_kernels.triton_support import padded_empty


def score_context(
    q: Tensor,
    k_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    groups: PrefixGroups | None,
    score_beyond: int,
    launch: Launch | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `api.score_context`; `launch` and `tile` override the launch tables."""
    logits = padded_empty(q.shape[0], q.shape[1], slots.shape[1], device=q.device)
    operands = q, k_cache, k_cache[..., :0], slots, seq_lens
    if groups is None:
        _, lse = split_decode(*operands, scaling, logits=logits, score_beyond=score_beyond, launch=launch)
    else:
        _, lse = group_decode(
            *operands, groups, scaling, logits=logits, score_beyond=score_beyond, launch=launch, tile=tile
        )
    return lse, logits
