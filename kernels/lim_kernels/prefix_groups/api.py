"""Public entry of prefix groups: what a group is, validation, dispatch."""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_rows
from lim_kernels.prefix_groups import reference
from lim_kernels.prefix_groups.state import PrefixGroups


def find_prefix_groups(
    slots: Tensor,
    seq_lens: Tensor,
    *,
    granule: int,
    set_columns: int = 0,
    uses_set: Tensor | None = None,
    implementation: str | None = None,
) -> PrefixGroups:
    """Find the rows that share leading KV slots, by comparing slots.

    A live KV slot holds one token of one prefix, so rows that hold one slot at position n - 1 share their n leading
    tokens, and how many they share is found by bisection. Slot 0 is SGLang's padding and shared by nobody. A row's last
    token, whose keys and values the step has just written, is always its own.

    Args:
        slots: int32 [B, L], KV slot of each position; entries at or beyond `seq_lens[b]` may hold anything.
        seq_lens: int32 or int64 [B], each 1 … L.
        granule: shared lengths count in multiples of so many tokens, rounded down; shorter ones are none. No group
            is found where that is more than L.
        set_columns: room for a row's set before its slots, in the rows that the groups' positions are to count in.
        uses_set: uint8 [B], rows that attend to the set in those columns instead of their slots: they are in no group,
            and their `own_starts` is 0.

    Raises:
        ValueError: wrong shape or dtype, or an unknown implementation.
    """
    op = "find_prefix_groups"
    require(slots.dim() == 2 and slots.dtype == torch.int32, op, "slots int32 [B, L]", f"{slots.dtype} {slots.shape}")
    require(seq_lens.shape == slots.shape[:1], op, f"seq_lens [{slots.shape[0]}]", list(seq_lens.shape))
    require(granule >= 1, op, "a granule of at least 1 token", granule)
    if uses_set is not None:
        fits = uses_set.shape == seq_lens.shape and uses_set.dtype == torch.uint8
        require(fits, op, f"uses_set uint8 {list(seq_lens.shape)}", f"{uses_set.dtype} {uses_set.shape}")
    require_rows(op, slots, seq_lens, uses_set)
    find = implementation_of(reference.find_prefix_groups, implementation, slots)
    return find(slots, seq_lens, granule=granule, set_columns=set_columns, uses_set=uses_set)
