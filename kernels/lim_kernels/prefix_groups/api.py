"""Public entry of prefix groups: what a group is, validation, dispatch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.dispatch import default_for, require, require_rows, resolve
from lim_kernels.prefix_groups import reference

MAX_LEVELS = 4
"""Most groups that one row is in, nested; deeper sharing is left to the rows themselves."""
_IMPLEMENTATIONS = ("reference", "triton")


@dataclass(frozen=True)
class PrefixGroups:
    """The prefix tree of a batch's rows, as far as it is shared; all tensors int32 on the rows' device.

    Group g stands for the positions `starts[g]` … `ends[g]` - 1, which its `counts[g]` >= 2 rows hold in the same KV
    slots. There are as many places for groups as rows; `counts[g]` is 0 where there is no group. Every position of a
    row belongs to at most one of its groups, or, from `own_starts[b]` on, to the row alone.
    """

    counts: Tensor
    """[B], rows in each group."""
    starts: Tensor
    """[B], first position of each group."""
    ends: Tensor
    """[B], position after each group's last."""
    parents: Tensor
    """[B], the group that ends where this one starts, -1 where it starts at 0."""
    members: Tensor
    """[B, B], rows of each group in ascending order, undefined after `counts[g]`."""
    own_starts: Tensor
    """[B], first position that each row shares with no other."""
    paths: Tensor
    """[B], the group that ends at `own_starts[b]`, -1 where that is 0."""
    followed: Tensor
    """[B], leading positions of each row that a row before it holds as well: what is not read again."""


def find_prefix_groups(
    slots: Tensor,
    seq_lens: Tensor,
    *,
    granule: int,
    lead: int = 0,
    apart: Tensor | None = None,
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
        lead: columns before the slots in the rows that the groups' positions are to count in.
        apart: uint8 [B], rows that are in no group and attend to those columns instead: their `own_starts` is 0.

    Raises:
        ValueError: wrong shape or dtype, or an unknown implementation.
    """
    op = "find_prefix_groups"
    require(slots.dim() == 2 and slots.dtype == torch.int32, op, "slots int32 [B, L]", f"{slots.dtype} {slots.shape}")
    require(seq_lens.shape == slots.shape[:1], op, f"seq_lens [{slots.shape[0]}]", list(seq_lens.shape))
    require(granule >= 1, op, "a granule of at least 1 token", granule)
    fits = apart is None or (apart.shape == seq_lens.shape and apart.dtype == torch.uint8)
    require(fits, op, f"apart uint8 {list(seq_lens.shape)}", apart is not None and f"{apart.dtype} {apart.shape}")
    require_rows(op, slots, seq_lens, apart)
    if resolve(op, implementation, _IMPLEMENTATIONS, default_for(slots)) == "reference":
        find = reference.find_prefix_groups
    else:
        from lim_kernels.prefix_groups.triton import find_prefix_groups as find
    return PrefixGroups(**find(slots, seq_lens, granule=granule, max_levels=MAX_LEVELS, lead=lead, apart=apart))
