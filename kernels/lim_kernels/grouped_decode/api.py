"""Public entry of grouped decode: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.dispatch import check_decode_operands, implementation_of, require, require_rows
from lim_kernels.grouped_decode import reference
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups


def grouped_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    scaling: Scaling,
    *,
    scored: bool = False,
    score_beyond: int = 0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode_with_scores`, reading the keys and values of a prefix group once for all its rows.

    Args:
        q, k_cache, v_cache, slots, seq_lens, scaling: as in `decode_with_scores`.
        groups: of these slots and lengths, by `find_prefix_groups`, or of sets, by `groups_of_sets`. A row attends to
            its groups' positions and, from `own_starts[b]` on, to its own: where a caller sets that, to a part of its
            slots. A row that is in a group may have none of its own.
        scored: whether logits are wanted.
        score_beyond: rows of at most so many slots need no logits, and may get none.

    Returns:
        out [B, H, D_v] in q's dtype; lse float32 [B, H], natural logarithm; logits float32 [B, H, L] as in
        `decode_with_scores`, or None.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "grouped_decode"
    check_decode_operands(op, q, k_cache, v_cache, slots, seq_lens, groups.counts)
    batch = q.shape[0]
    require(slots.dim() == 2 and slots.shape[0] == batch, op, f"slots [{batch}, L]", list(slots.shape))
    require(seq_lens.shape == slots.shape[:1], op, f"seq_lens [{batch}]", list(seq_lens.shape))
    require(groups.counts.shape == seq_lens.shape, op, f"groups of {batch} rows", list(groups.counts.shape))
    require_rows(op, slots)
    decode = implementation_of(reference.grouped_decode, implementation, q)
    return decode(
        q,
        k_cache,
        v_cache,
        slots,
        seq_lens,
        groups,
        scaling,
        scored=scored,
        score_beyond=score_beyond,
    )
