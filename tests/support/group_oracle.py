"""The sets of prefix groups that choose together, by brute force from the words of `choose_for_groups`."""

import math
from fractions import Fraction
from itertools import pairwise

from torch import Tensor

from lim_kernels.prefix_groups import MAX_LEVELS
from support.set_oracle import SetRule


def grouped_parts(
    row: int, lens: list[int], shared: list[list[int]], levels: int, *, budget: int, recent: int, sinks: int
) -> list[tuple[list[int], range, list[int], int]]:
    """Of one row, by `choose_for_groups`: rows, positions, forced positions and number of tokens of each segment.

    Args:
        shared: [B][B], leading tokens that two rows share; levels: how many different lengths of a row count.
    """

    def cuts_of(one: int) -> list[int]:
        return [0, *sorted({n for n in shared[one] if n})[:levels], lens[one]]

    def rows_to(one: int, end: int) -> list[int]:
        return [other for other in range(len(lens)) if other == one or (end < lens[one] and shared[one][other] >= end)]

    def forced_in(one: int, start: int, end: int) -> list[int]:
        windows = [lens[other] - recent for other in rows_to(one, end)]
        return [p for p in range(start, end) if p < sinks or p >= min(windows)]

    def owed_from(one: int, begin: int) -> int:
        return sum(len(forced_in(one, s, e)) for s, e in pairwise(cuts_of(one)) if s >= begin)

    parts, left = [], budget
    for start, end in pairwise(cuts_of(row)):
        rows, forced = rows_to(row, end), forced_in(row, start, end)
        first = [p for p in forced if p < sinks]
        needs = []
        for one in rows:
            rest, owed = lens[one] - end, owed_from(one, end)
            free, unforced = left - len(forced) - owed, lens[one] - start - len(forced) - owed
            fair = math.floor(Fraction(free * (rest - owed), unforced)) if free > 0 and unforced else 0
            needs.append(min(rest, left - len(first), owed + fair))
        count = min(end - start, left - max(needs))
        others = [p for p in forced if p >= sinks]
        kept = others[max(0, len(others) - (count - len(first))) :]
        parts.append((rows, range(start, end), first + kept, count))
        left -= count
    return parts


def shared_of_long(slots: Tensor, lens: list[int], *, budget: int, granule: int) -> list[list[int]]:
    """[B][B], leading slots that two rows longer than the budget share, slot by slot, in multiples of `granule`."""
    most = [length - 1 if length > budget else 0 for length in lens]
    shared = [[0] * len(lens) for _ in lens]
    for one in range(len(lens)):
        for other in range(one):
            mine, theirs = (slots[row, : min(most[one], most[other])] for row in (one, other))
            equal = int(((mine == theirs) & (mine != 0)).long().cumprod(0).sum())
            shared[one][other] = shared[other][one] = equal // granule * granule
    return shared


def check_group_sets(
    rule: SetRule, served: list[list[int]], logits: list[Tensor], errors: list[Tensor], shared: list[list[int]]
) -> None:
    """Assert that logits within `errors` of `logits`, float64 [H, length] each, can have led to the sets `served`."""
    lens = [row.shape[1] for row in logits]
    sizes = {"budget": rule.budget, "recent": rule.recent, "sinks": rule.kept_sinks}
    places = [
        _places(rule, *row) if row[0].shape[1] > rule.budget else ([], []) for row in zip(logits, errors, strict=True)
    ]
    for row, length in enumerate(lens):
        if length <= rule.budget:
            assert served[row] == list(range(length))
            continue
        parts = grouped_parts(row, lens, shared, MAX_LEVELS, **sizes)
        assert len(served[row]) == sum(part[3] for part in parts)
        for rows, positions, forced, quota in parts:
            mine = [p for p in served[row] if p in positions]
            assert len(mine) == quota and {*forced} <= {*mine}
            assert all([p for p in served[other] if p in positions] == mine for other in rows)
            chosen, left = {*mine} - {*forced}, {*positions} - {*mine} - {*forced}
            # Once for all rows of a segment.
            if row == rows[0] and chosen and left:
                low, high = ([_combine(rule, [places[one][i] for one in rows], p) for p in positions] for i in (0, 1))
                worst = max(low[p - positions.start] for p in chosen)
                assert worst <= min(high[p - positions.start] for p in left)


def _places(rule: SetRule, logits: Tensor, error: Tensor) -> tuple[list[float], list[float]]:
    low, high = rule.places(logits, error, logits.shape[1])
    if rule.aggregate != "union":
        return low, high
    # Tokens that no head lists are equally bad.
    worst = rule.middle * logits.shape[0]
    return tuple([min(place, worst) for place in bound] for bound in (low, high))


def _combine(rule: SetRule, bounds: list[list[float]], position: int) -> float:
    places = [bound[position] for bound in bounds]
    return math.fsum(places) if rule.aggregate == "sum" else min(places)
