"""Do the rows of a prefix group choose the same tokens of what they share, and those that are specified?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, choose_for_groups, choose_tokens, find_prefix_groups, groups_of_sets
from lim_kernels.prefix_groups import MAX_LEVELS
from prefix_rows import prefix_rows, shared_by_comparison
from support.group_oracle import grouped_parts
from support.prefix_tree import groups_of, members_of
from test_select_tokens_triton import SCORES, SIZES, candidates_of

EXAMPLES = {"reference": 400, "triton": 25}
WIDE = SetSizes(600, recent=150, sinks=4)


def long_only(seq_lens, budget):
    """Lengths with which `find_prefix_groups` leaves rows within the budget alone."""
    return torch.where(seq_lens > budget, seq_lens, 1)


def groups_of_long(slots, seq_lens, granule, budget):
    return find_prefix_groups(slots, long_only(seq_lens, budget), granule=granule, implementation="reference")


def poisoned_scores(noise, seq_lens, sizes):
    """Scores that are NaN wherever they are undefined."""
    return noise.masked_fill(~candidates_of(seq_lens, noise.shape[1], sizes), float("nan"))


@st.composite
def batches(draw):
    """Rows of a prefix tree of several depths, sizes of the selection, and scores with and without ties."""
    slots, seq_lens = prefix_rows(
        draw(st.integers(1, 12)),
        draw(st.integers(1, 80)),
        segment=draw(st.sampled_from([2, 5, 12, 30])),
        seed=draw(st.integers(0, 2**31)),
        alphabet=draw(st.integers(1, 3)),
    )
    budget = draw(st.integers(1, 40))
    sinks = draw(st.integers(0, min(budget, 6)))
    sizes = SetSizes(budget, draw(st.integers(0, budget - sinks)), sinks)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = SCORES[draw(st.sampled_from(["random", "ties", "equal", "unlisted", "all-unlisted"]))](
        torch.randn(slots.shape, generator=generator)
    )
    return slots, seq_lens, draw(st.sampled_from([1, 4])), sizes, poisoned_scores(noise, seq_lens, sizes)


def combined_score(values, combine):
    """One score of a position's, in float64."""
    peak = max(values)
    if combine == "max" or peak == -math.inf:
        return peak
    return peak + math.log(sum(math.exp(value - peak) for value in values))


def check_sets(sets, counts, scores, seq_lens, slots, granule, sizes, combine):
    """Each row's set against the oracle, segment by segment; what is not forced is compared by its score."""
    lens, table = seq_lens.tolist(), scores.tolist()
    shared = shared_by_comparison(slots, long_only(seq_lens, sizes.budget), granule).tolist()
    long_rows = [row for row, length in enumerate(lens) if length > sizes.budget]
    all_parts = {row: grouped_parts(row, lens, shared, MAX_LEVELS, **vars(sizes)) for row in long_rows}
    most = max((len(parts) for parts in all_parts.values()), default=1)
    roomy = sizes.budget >= sizes.sinks + most * sizes.recent
    chosen = {}
    for row, length in enumerate(lens):
        count = int(counts[row])
        kept = sets[row, :count].tolist()
        assert kept == sorted(set(kept)) and (sets[row, count:] == -1).all()
        if length <= sizes.budget:
            assert kept == list(range(length))
            continue
        parts = all_parts[row]
        assert count == sum(part[3] for part in parts) <= sizes.budget
        # Sinks, and the window as far as the row has it for itself; all of it where everything forced has room.
        window = length - sizes.recent
        window = window if roomy else max(window, parts[-1][1].start)
        assert {*range(sizes.sinks), *range(window, length)} <= {*kept}
        if len(parts) == 1:
            assert count == sizes.budget
        for rows, positions, forced, quota in parts:
            mine = [p for p in kept if p in positions]
            assert len(mine) == quota and {*forced} <= {*mine}
            assert chosen.setdefault((min(rows), positions), mine) == mine
            free = [p for p in positions if p not in forced]
            if len(forced) == quota:
                continue
            by_score = {p: combined_score([table[one][p] for one in rows], combine) for p in free}
            if combine == "max":
                best = sorted(free, key=lambda p: (-by_score[p], p))[: quota - len(forced)]
                assert sorted([*best, *forced]) == mine
            else:
                worst = min(by_score[p] for p in mine if p not in forced)
                left_out = max([by_score[p] for p in free if p not in mine], default=-math.inf)
                assert worst >= left_out - 1e-5 * max(1, abs(left_out) if left_out > -math.inf else 1)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("combine", ["max", "logsumexp"])
def test_rows_choose_as_specified(implementation, device, combine):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(batches())
    def check(case):
        slots, seq_lens, granule, sizes, scores = case
        groups = groups_of_long(slots.to(device), seq_lens.to(device), granule, sizes.budget)
        call = scores.to(device), seq_lens.to(device), groups, sizes
        how = {"combine": combine, "implementation": implementation}
        sets, counts = (result.cpu() for result in choose_for_groups(*call, **how))
        assert sets.dtype == counts.dtype == torch.int32 and sets.shape == (len(seq_lens), sizes.budget)
        check_sets(sets, counts, scores, seq_lens, slots, granule, sizes, combine)
        in_slots, same = (result.cpu() for result in choose_for_groups(*call, **how, slots=slots.to(device)))
        expected = slots.gather(1, sets.clamp(min=0).long()).masked_fill(sets < 0, 0)
        assert torch.equal(in_slots, expected) and torch.equal(same, counts)

    check()


def check_set_groups(found, counts, sets, set_counts, groups, smallest):
    """Groups of sets against the sets: each group's tokens, and those of too small groups before it, are one part."""
    assert counts.tolist() == set_counts.tolist()
    found, whole = ({name: field.cpu() for name, field in vars(tree).items()} for tree in (found, groups))
    used = set()
    for row, kept in enumerate(sets.tolist()):
        parts, begin, already_read = [], 0, 0
        for group in reversed(groups_of(whole, row)):
            end = sum(0 <= position < int(whole["ends"][group]) for position in kept)
            if end - begin >= smallest:
                members = members_of(whole, group)
                assert members_of(found, group) == members
                assert all(sets[other, begin:end].tolist() == kept[begin:end] for other in members)
                already_read = end if members[0] < row else already_read
                parts.append((group, begin, end))
                begin = end
        ours = [(g, int(found["starts"][g]), int(found["ends"][g])) for g in reversed(groups_of(found, row))]
        assert ours == parts
        assert (int(found["own_starts"][row]), int(found["already_read"][row])) == (begin, already_read)
        used |= {group for group, _, _ in parts}
    assert {group for group, count in enumerate(found["counts"].tolist()) if count} == used


def test_sets_form_the_groups_that_are_foretold(implementation, device):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(batches(), st.sampled_from([1, 2, 7]))
    def check(case, smallest):
        slots, seq_lens, granule, sizes, scores = case
        groups = groups_of_long(slots.to(device), seq_lens.to(device), granule, sizes.budget)
        found, counts = groups_of_sets(
            seq_lens.to(device), groups, sizes, smallest=smallest, implementation=implementation
        )
        sets, set_counts = choose_for_groups(
            scores.to(device), seq_lens.to(device), groups, sizes, combine="max", implementation="reference"
        )
        check_set_groups(found, counts, sets.cpu(), set_counts, groups, smallest)

    check()


def test_where_nothing_is_shared_it_is_choose_tokens(implementation, device):
    @settings(max_examples=EXAMPLES[implementation] // 2, deadline=None)
    @given(batches(), st.sampled_from(["max", "logsumexp"]))
    def check(case, combine):
        slots, seq_lens, _, sizes, scores = (part.to(device) if torch.is_tensor(part) else part for part in case)
        groups = groups_of_long(slots, seq_lens, 1000, sizes.budget)
        how = {"implementation": implementation}
        results = choose_for_groups(scores, seq_lens, groups, sizes, combine=combine, **how)
        for ours, theirs in zip(results, choose_tokens(scores, seq_lens, sizes, **how), strict=True):
            assert torch.equal(ours, theirs)

    check()


def tree_of_three(width):
    """Rows 0-4 share 3,000 tokens, rows 1-3 another 1,100; rows 5 and 6 share nothing; row 7 is a graph's padding."""
    slots = torch.arange(1, 8 * width + 1, dtype=torch.int32).view(8, width)
    slots[:5, :3000] = slots[0, :3000]
    slots[1:4, 3000:4100] = slots[1, 3000:4100]
    slots[7] = 0
    seq_lens = torch.tensor([5000, 4101, 4900, 4400, 3001, 5000, 20, 1], dtype=torch.int32)
    return slots, seq_lens


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(kind, WIDE) for kind in SCORES] + [(kind, sizes) for kind in ("random", "one-bin") for sizes in SIZES.values()],
    ids=[*SCORES] + [f"{kind}-{name}" for kind in ("random", "one-bin") for name in SIZES],
)
def test_triton_gives_the_reference_s_sets(device, triton_runs, kind, sizes):
    # Segments that begin and end within the blocks of tokens that a program passes over, and bins that hold them all.
    slots, seq_lens = (part.to(device) for part in tree_of_three(5000))
    noise = torch.randn(slots.shape, generator=torch.Generator().manual_seed(5)).to(device)
    scores = poisoned_scores(SCORES[kind](noise), seq_lens, sizes)
    groups = groups_of_long(slots, seq_lens, 50, sizes.budget)
    assert sorted(groups.counts.tolist()) == [0] * 6 + [3, 5]
    results, expected = (
        choose_for_groups(scores, seq_lens, groups, sizes, combine="max", slots=slots, implementation=implementation)
        for implementation in ("triton", "reference")
    )
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][7, 0] == 0 and results[1][7] == 1


def test_sets_in_slots_form_groups_themselves(implementation, device):
    slots, seq_lens = (part.to(device) for part in tree_of_three(5000))
    noise = torch.randn(slots.shape, generator=torch.Generator().manual_seed(6)).to(device)
    groups = groups_of_long(slots, seq_lens, 50, WIDE.budget)
    scores = poisoned_scores(noise, seq_lens, WIDE)
    sets, counts = choose_for_groups(
        scores, seq_lens, groups, WIDE, combine="max", slots=slots, implementation=implementation
    )
    found = find_prefix_groups(sets, counts, granule=1, implementation="reference")
    # The neediest of rows 0-4 is row 2: beyond the group its own window and, in the inner group, row 1's are forced,
    # 299; 153 are in the group, and of the 148 that are left it needs floor(148 * 1601 / 4448) = 53 for its 1,601
    # others. In the inner group it needs its window and floor(53 * 650 / 1601) = 21.
    assert found.own_starts.tolist() == [248, 429, 429, 429, 248, 0, 0, 0]
    assert counts.tolist() == [600, 430, 600, 600, 249, 600, 20, 1]


def test_many_rows_and_wide_views(implementation, device):
    # More rows than are combined at once; scores, slots and lengths as a captured graph passes them.
    batch, width = 37, 300
    slots = torch.arange(1, batch * width + 1, dtype=torch.int32).view(batch, width)
    slots[:35, :200] = slots[0, :200]
    seq_lens = torch.randint(230, width, (batch,), generator=torch.Generator().manual_seed(1))
    sizes = SetSizes(64, recent=16, sinks=4)
    noise = torch.full((batch, 400), float("nan"))
    noise[:, :width] = torch.randn(batch, width, generator=torch.Generator().manual_seed(2))
    slots, seq_lens, noise = slots.to(device), seq_lens.to(device), noise.to(device)
    groups = groups_of_long(slots, seq_lens, 8, sizes.budget)
    for combine in ("max", "logsumexp"):
        how = {"combine": combine, "implementation": implementation}
        sets, counts = choose_for_groups(noise[:, :width], seq_lens, groups, sizes, **how)
        check_sets(sets.cpu(), counts.cpu(), noise[:, :width].cpu(), seq_lens.cpu(), slots.cpu(), 8, sizes, combine)


def test_shares_beyond_32_bits(device, triton_runs):
    slots = torch.arange(1, 180_001, dtype=torch.int32, device=device).view(2, 90_000)
    slots[1, :20_000] = slots[0, :20_000]
    seq_lens = torch.tensor([90_000, 70_000], device=device)
    scores = torch.randn(2, 90_000, generator=torch.Generator().manual_seed(0)).to(device)
    sizes = SetSizes(50_000, recent=12_500, sinks=4)
    groups = groups_of_long(slots, seq_lens, 16, sizes.budget)
    results, expected = (
        choose_for_groups(scores, seq_lens, groups, sizes, combine="max", implementation=implementation)
        for implementation in ("triton", "reference")
    )
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    # The window and floor(37,496 * 57,500 / 77,496) others are for the 70,000 positions that row 0 has beyond.
    assert (results[0][0] < 20_000).sum() == 50_000 - 12_500 - 27_821


def test_a_prefix_of_nearly_everything_leaves_room_for_sinks_and_window(implementation, device):
    # Proportion alone would give the group of 16 shared tokens none of its sinks, and row 1 little of its window.
    slots = torch.arange(1, 801, dtype=torch.int32).view(2, 400).to(device)
    slots[1, :16] = slots[0, :16]
    seq_lens = torch.tensor([400, 17], device=device)
    scores = torch.zeros(2, 400, device=device)
    groups = groups_of_long(slots, seq_lens, 16, 16)
    sets, counts = choose_for_groups(
        scores, seq_lens, groups, SetSizes(16, recent=5, sinks=4), combine="max", implementation=implementation
    )
    assert sets[1].tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, *[-1] * 6] and counts.tolist() == [16, 10]
    assert sets[0].tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, 17, *range(395, 400)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(9)}, r"scores float32 \[B, L\]"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens \[2\]"),
        ({"sizes": SetSizes(3, recent=2, sinks=2)}, r"budget >= recent \+ sinks"),
        ({"combine": "sum"}, "combine in"),
        ({"slots": torch.ones(2, 9, dtype=torch.int64)}, r"slots int32 \[2, 9\]"),
        ({"scores": torch.zeros(9, 2).T}, "contiguous"),
        ({"implementation": "cuda"}, "implementation among"),
    ],
    ids=["rank", "rows", "budget", "combine", "slots", "strides", "implementation"],
)
def test_bad_operands_are_named(change, message):
    slots, seq_lens = torch.ones(2, 9, dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
    sizes = SetSizes(4, recent=2, sinks=2)
    call = {"scores": torch.zeros(2, 9), "seq_lens": seq_lens, "sizes": sizes, "combine": "max"}
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    with pytest.raises(ValueError, match=message):
        choose_for_groups(groups=groups, **call | change)


def test_small_groups_fall_to_those_within_them(implementation, device):
    slots, seq_lens = (part.to(device) for part in tree_of_three(5000))
    groups = groups_of_long(slots, seq_lens, 50, WIDE.budget)
    # 248 set tokens of rows 0-4 and 181 more of rows 1-3, as in the test above.
    for smallest, own_starts in ((181, [248, 429, 429, 429, 248]), (182, [248] * 5), (249, [0, 429, 429, 429, 0])):
        found, _ = groups_of_sets(seq_lens, groups, WIDE, smallest=smallest, implementation=implementation)
        assert found.own_starts.tolist() == [*own_starts, 0, 0, 0]
    assert sorted(found.counts.tolist()) == [0] * 7 + [3] and found.parents.max() == -1


def test_bad_operands_of_set_groups_are_named():
    slots, seq_lens = torch.ones(2, 9, dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
    groups = find_prefix_groups(slots, seq_lens, granule=4)
    sizes = SetSizes(4, recent=1, sinks=1)
    with pytest.raises(ValueError, match=r"seq_lens \[2\]"):
        groups_of_sets(seq_lens[:1], groups, sizes)
    with pytest.raises(ValueError, match="smallest at least 1"):
        groups_of_sets(seq_lens, groups, sizes, smallest=0)
    with pytest.raises(ValueError, match=r"budget >= recent \+ sinks"):
        groups_of_sets(seq_lens, groups, SetSizes(1, recent=1, sinks=1))
    with pytest.raises(ValueError, match="implementation among"):
        groups_of_sets(seq_lens, groups, sizes, implementation="cuda")


def test_groups_of_other_rows_are_refused():
    groups = find_prefix_groups(torch.ones(3, 9, dtype=torch.int32), torch.ones(3, dtype=torch.int32), granule=4)
    with pytest.raises(ValueError, match="groups of 2 rows"):
        choose_for_groups(torch.zeros(2, 9), torch.ones(2), groups, SetSizes(4, recent=1, sinks=1), combine="max")
