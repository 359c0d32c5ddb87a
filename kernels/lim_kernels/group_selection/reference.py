"""Specification of selection for prefix groups in plain torch: group by group from the outermost, then row by row.

It asks the host which groups there are, which costs nothing on a CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def choose_for_groups(
    scores: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    *,
    budget: int,
    recent: int,
    sinks: int,
    combine: str,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_for_groups`."""
    batch = scores.shape[0]
    lens = seq_lens.tolist()
    segments = cut(lens, groups, recent=recent, sinks=sinks)
    # Of each row: forced positions of the segments from the present one on, and tokens chosen of those before it.
    owed, counts = [0] * batch, [0] * batch
    for part in segments:
        for row in part.rows:
            owed[row] += part.head + part.tail
    sets = torch.full((batch, budget), -1 if slots is None else 0, dtype=torch.int32, device=scores.device)
    for part in segments:
        for row in part.rows:
            owed[row] -= part.head + part.tail
        quota = share(
            part, budget - counts[part.rows[0]], [lens[row] for row in part.rows], [owed[r] for r in part.rows]
        )
        combined = scores[part.rows, part.start : part.end]
        combined = combined.amax(0) if combine == "max" else combined.logsumexp(0)
        positions = part.start + best(combined, quota, part.head, min(part.tail, quota - part.head))
        for row in part.rows:
            chosen = positions if slots is None else slots[row, positions]
            sets[row, counts[row] : counts[row] + quota] = chosen.to(sets.dtype)
            counts[row] += quota
    return sets, torch.tensor(counts, dtype=torch.int32, device=scores.device)


def cut(lens: list[int], groups: PrefixGroups, *, recent: int, sinks: int) -> list[Segment]:
    """All segments, those of outer groups before those in them, rows' own ones last."""
    fields = (groups.members, groups.counts, groups.starts, groups.ends)
    found = zip(*(field.tolist() for field in fields), strict=True)
    shared = sorted(((start, end, rows[:count]) for rows, count, start, end in found if count))
    own = [(start, lens[row], [row]) for row, start in enumerate(groups.own_starts.tolist())]
    segments = []
    for start, end, rows in shared + own:
        head = max(0, min(sinks, end) - start)
        window = end - (min(lens[row] for row in rows) - recent)
        segments.append(Segment(rows, start, end, head, tail=max(0, min(window, end - start - head))))
    return segments


def share(part: Segment, available: int, lens: list[int], owed: list[int]) -> int:
    """How many of the available tokens a segment gets, from its rows' lengths and what they owe beyond it."""
    needs = []
    for length, forced in zip(lens, owed, strict=True):
        rest = length - part.end
        fair = available * rest // (length - part.start)
        wanted = max(forced, min(fair, available - part.head - part.tail))
        needs.append(min(rest, available - part.head, wanted))
    return min(part.end - part.start, available - max(needs))


def best(scores: Tensor, count: int, head: int, tail: int) -> Tensor:
    """int64 [count], ascending: the `head` first positions of scores [n], the `tail` last, the best of the others."""
    last = len(scores) - tail
    middle = head + scores[head:last].sort(descending=True, stable=True).indices[: count - head - tail]
    ends = [torch.arange(start, end, device=scores.device) for start, end in ((0, head), (last, len(scores)))]
    return torch.cat([ends[0], middle.sort().values, ends[1]])
