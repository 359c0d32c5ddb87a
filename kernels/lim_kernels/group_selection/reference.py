"""Specification of selection for prefix groups in plain torch: group by group from the outermost, then row by row.

It asks the host which groups there are, which costs nothing on a CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.prefix_groups import PrefixGroups


@dataclass(frozen=True)
class Segment:
    """Positions `start` … `end` - 1 of `rows`: a group's, or one row's own."""

    rows: list[int]
    start: int
    end: int
    head: int
    """How many of the first positions are sinks."""
    tail: int
    """How many of the others, the last ones, are in the window of a row."""
    group: int = -1
    """The group's number, -1 for a row's own."""


def choose_for_groups(
    scores: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    sizes: SetSizes,
    *,
    combine: str,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_for_groups`."""
    batch = scores.shape[0]
    counts = [0] * batch
    sets = torch.full((batch, sizes.budget), -1 if slots is None else 0, dtype=torch.int32, device=scores.device)
    for part, quota in plan(seq_lens.tolist(), groups, sizes):
        combined = scores[part.rows, part.start : part.end]
        combined = combined.amax(0) if combine == "max" else combined.logsumexp(0)
        positions = part.start + best(combined, quota, part.head, min(part.tail, quota - part.head))
        for row in part.rows:
            chosen = positions if slots is None else slots[row, positions]
            sets[row, counts[row] : counts[row] + quota] = chosen.to(sets.dtype)
            counts[row] += quota
    return sets, torch.tensor(counts, dtype=torch.int32, device=scores.device)


def groups_of_sets(
    seq_lens: Tensor, groups: PrefixGroups, sizes: SetSizes, *, smallest: int
) -> tuple[PrefixGroups, Tensor]:
    """See `api.groups_of_sets`."""
    batch = len(seq_lens)
    counts, starts, ends, parents = [0] * batch, [0] * batch, [0] * batch, [-1] * batch
    # Of each row: where its own part begins after the groups so far, the last of them, and what rows before it read.
    own_starts, innermost, already_read, taken = [0] * batch, [-1] * batch, [0] * batch, [0] * batch
    for part, quota in plan(seq_lens.tolist(), groups, sizes):
        first, group = part.rows[0], part.group
        end = taken[first] + quota
        if group >= 0 and end - own_starts[first] >= smallest:
            counts[group], starts[group], ends[group] = len(part.rows), own_starts[first], end
            parents[group] = innermost[first]
            for row in part.rows:
                own_starts[row], innermost[row] = end, group
                already_read[row] = end if row != first else already_read[row]
        for row in part.rows:
            taken[row] = end

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=seq_lens.device)

    in_sets = PrefixGroups(
        counts=tensor(counts),
        starts=tensor(starts),
        ends=tensor(ends),
        parents=tensor(parents),
        members=groups.members,
        own_starts=tensor(own_starts),
        innermost=tensor(innermost),
        already_read=tensor(already_read),
    )
    return in_sets, tensor(taken)


def plan(lens: list[int], groups: PrefixGroups, sizes: SetSizes) -> list[tuple[Segment, int]]:
    """All segments in the order of `cut`, and how many tokens each takes."""
    segments = cut(lens, groups, recent=sizes.recent, sinks=sizes.sinks)
    # Of each row: forced positions of the segments from the present one on, and tokens taken by those before it.
    owed, taken = [0] * len(lens), [0] * len(lens)
    for part in segments:
        for row in part.rows:
            owed[row] += part.head + part.tail
    planned = []
    for part in segments:
        for row in part.rows:
            owed[row] -= part.head + part.tail
        quota = share(
            part, sizes.budget - taken[part.rows[0]], [lens[row] for row in part.rows], [owed[r] for r in part.rows]
        )
        planned.append((part, quota))
        for row in part.rows:
            taken[row] += quota
    return planned


def cut(lens: list[int], groups: PrefixGroups, *, recent: int, sinks: int) -> list[Segment]:
    """All segments, those of outer groups before those in them, rows' own ones last."""
    fields = (groups.members, groups.counts, groups.starts, groups.ends)
    found = enumerate(zip(*(field.tolist() for field in fields), strict=True))
    shared = sorted((start, end, rows[:count], group) for group, (rows, count, start, end) in found if count)
    own = [(start, lens[row], [row], -1) for row, start in enumerate(groups.own_starts.tolist())]
    segments = []
    for start, end, rows, group in shared + own:
        head = max(0, min(sinks, end) - start)
        window = end - (min(lens[row] for row in rows) - recent)
        segments.append(Segment(rows, start, end, head, max(0, min(window, end - start - head)), group))
    return segments


def share(part: Segment, available: int, lens: list[int], owed: list[int]) -> int:
    """How many of the available tokens a segment gets, from its rows' lengths and what they owe beyond it."""
    needs = []
    for length, forced in zip(lens, owed, strict=True):
        rest = length - part.end
        free = max(0, available - part.head - part.tail - forced)
        # At least 1, where there is nothing to be shared.
        candidates = max(1, length - part.start - part.head - part.tail - forced)
        needs.append(min(rest, available - part.head, forced + free * (rest - forced) // candidates))
    return min(part.end - part.start, available - max(needs))


def best(scores: Tensor, count: int, head: int, tail: int) -> Tensor:
    """int64 [count], ascending: the `head` first positions of scores [n], the `tail` last, the best of the others."""
    last = len(scores) - tail
    middle = head + scores[head:last].sort(descending=True, stable=True).indices[: count - head - tail]
    ends = [torch.arange(start, end, device=scores.device) for start, end in ((0, head), (last, len(scores)))]
    return torch.cat([ends[0], middle.sort().values, ends[1]])
