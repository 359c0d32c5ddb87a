"""Public entry of selection for prefix groups: what is chosen, validation, dispatch."""

from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_one_device
from lim_kernels.group_selection import reference
from lim_kernels.operands import SetSizes
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.select_tokens.api import check_scores

COMBINATIONS = ("max", "logsumexp")


def choose_for_groups(
    scores: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    sizes: SetSizes,
    *,
    combine: str,
    slots: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`choose_tokens`, but the rows of a prefix group choose the same tokens of what they share.

    Sets are ascending, so the sets of a group's rows have equal leading entries, and in slots `find_prefix_groups`
    finds them: sparse layers then read the group's tokens once for all its rows.

    A row's positions are the segments of the groups that it is in, outermost first, and then its own. A position is
    forced if it is one of the `sinks` first, or among the `recent` last of any row of its segment. The budget goes down
    the path: where A tokens are left at a group of positions start … end - 1, each of its rows needs some of them for
    the `rest = seq_len - end` positions that it has beyond, and the group gets what the neediest row leaves:

        need  = min(rest, A - sinks in the group, owed + floor(free * (rest - owed) / open))
        owed  = how many of the row's positions beyond the group are forced
        free  = max(0, A - forced in the group - owed), tokens that may go anywhere
        open  = how many of the positions from `start` on are not forced, among which they go in proportion
        quota = min(end - start, A - largest need)

    So what a row has for itself gets its share beside its window, which is most of what is forced. (A share of all
    positions, forced or not, would leave all but the window of a short part without a token.)

    The group chooses its sinks, its other forced positions (the last ones, if not all fit), and with what is left of
    the quota those others that have the best combined scores of its rows. At its own segment a row takes min(A, length)
    tokens: the forced ones, and the others of its best scores. Equal scores go to the lower position.

    So a row has at most `budget` tokens, and fewer only where another row of its group needs more than it has beyond.
    Its sinks and the part of its window that is its own are always kept. All of its window is, unless the forced
    positions of some row's path exceed the budget: they are `sinks + recent * (groups on the path + 1)` at most, and
    about `sinks + recent` where the rows of a group are about equally long.

    Args:
        scores: float32 [B, L], larger is better; read for the candidates of rows longer than the budget.
        seq_lens: int32 or int64 [B].
        groups: of rows that are longer than the budget. `find_prefix_groups` gives them if it is told that the other
            rows have length 1. A row within the budget that is in no group keeps everything.
        sizes: as in `score_tokens`.
        combine: how the scores of a group's rows become one: "max" (fitting for "max" and "union" scores), or
            "logsumexp" (for "sum").
        slots: int32 [B, L], KV slot of each position, to have the set in slots rather than in positions.

    Returns:
        positions int32 [B, K] with K = `sizes.budget`, ascending, -1 after `counts[b]`, or their slots in that order,
        0 after `counts[b]`; counts int32 [B]. Both are those of `choose_tokens` for rows that are in no group.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown combination or implementation, or a budget that does not
            cover sinks and window.
    """
    op = "choose_for_groups"
    check_scores(op, scores, seq_lens, slots)
    batch = scores.shape[0]
    require(groups.counts.shape == seq_lens.shape, op, f"groups of {batch} rows", list(groups.counts.shape))
    require_one_device(op, scores, seq_lens, groups.counts)
    sizes.check(op)
    require(combine in COMBINATIONS, op, f"combine in {COMBINATIONS}", repr(combine))
    choose = implementation_of(reference.choose_for_groups, implementation, scores)
    return choose(scores, seq_lens, groups, sizes, combine=combine, slots=slots)


def groups_of_sets(
    seq_lens: Tensor,
    groups: PrefixGroups,
    sizes: SetSizes,
    *,
    smallest: int = 1,
    implementation: str | None = None,
) -> tuple[PrefixGroups, Tensor]:
    """Which rows have equal leading entries in the sets that `choose_for_groups` gives them.

    Sets are ascending, so what a group chooses lies at the same places of all its rows' sets, and how much it chooses
    follows from lengths alone: this is known before any scores are, for all selection layers of a step. With it,
    `grouped_decode` over the sets reads a group's tokens once.

    Args:
        seq_lens, groups, sizes: as in `choose_for_groups`.
        smallest: a group of fewer set tokens is not worth a part of its own, and each of its rows, or the next group
            on the way to it, takes them for its own.

    Returns:
        Groups by place in the sets, under the numbers of `groups`; and int32 [B], tokens in each row's set.

    Raises:
        ValueError: wrong shape or device, an unknown implementation, or a budget that does not cover sinks and window.
    """
    op = "groups_of_sets"
    fits = seq_lens.dim() == 1 and groups.counts.shape == seq_lens.shape
    require(fits, op, f"seq_lens [{len(groups.counts)}]", list(seq_lens.shape))
    require(seq_lens.device == groups.counts.device, op, f"seq_lens on {groups.counts.device}", seq_lens.device)
    require(smallest >= 1, op, "smallest at least 1 token", smallest)
    sizes.check(op)
    find = implementation_of(reference.groups_of_sets, implementation, seq_lens)
    return find(seq_lens, groups, sizes, smallest=smallest)
