"""What prefix groups are."""

from dataclasses import dataclass

from torch import Tensor

MAX_LEVELS = 4
"""Most groups that one row is in, nested; deeper sharing is left to the rows themselves."""


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
    innermost: Tensor
    """[B], each row's innermost group, which ends at `own_starts[b]`; -1 where that is 0."""
    already_read: Tensor
    """[B], leading positions of each row that a row before it in the batch holds as well: they are not read again."""
