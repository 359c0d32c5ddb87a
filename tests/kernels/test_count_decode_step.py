"""Are a step's accounts right whatever requests come, stay and leave, with every implementation?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, count_decode_step, count_sets, find_prefix_groups, groups_of_sets
from lim_kernels.count_decode_step import TOTALS, Layers, Ledger, Sharing
from lim_kernels.row_actions import EARLY, KEEP, RECALL, SELECT

ROWS = 7


def named(totals):
    return dict(zip(TOTALS, totals.tolist(), strict=True))


class Accounts:
    """What the totals should be, from one dictionary a row and step, and one a tenant."""

    def __init__(self) -> None:
        self.steps: list[dict[int, dict[str, int]]] = []
        self.ran: list[set[int]] = []
        self.final = 0
        self.outgrew: dict[tuple[int, int], bool] = {}

    def step(self, tenants, lens, layers, budget):
        self.steps.append({})
        self.ran.append({row for row, _ in tenants})
        for tenant, length in zip(tenants, lens, strict=True):
            sparse = layers.sparse + layers.scoring > 0 and length > budget
            whole = layers.all - layers.sparse - layers.scoring * sparse
            self.steps[-1][tenant[0]] = {
                "tokens_attended": whole * length + (layers.all - whole) * min(length, budget),
                "tokens_scored": layers.scoring * length * sparse,
                "tokens_dense": layers.all * length,
                "selections": layers.selecting * sparse,
                "requests": tenant not in self.outgrew,
                "requests_sparse": sparse and not self.outgrew.get(tenant, False),
            }
            self.outgrew[tenant] = sparse or self.outgrew.get(tenant, False)

    def discard(self, row):
        """Take out a row's last step, if it is one of the last two and was not settled."""
        place = max((n for n, rows in enumerate(self.ran) if row in rows), default=-1)
        if place >= max(self.final, len(self.steps) - 2):
            self.steps[place].pop(row, None)

    def settled(self):
        """Nothing is in flight."""
        self.final = len(self.steps)

    def totals(self, steps):
        """Over so many of the steps."""
        found = dict.fromkeys(TOTALS, 0) | {"decode_steps": sum(bool(step) for step in self.steps[:steps])}
        for amounts in (row for step in self.steps[:steps] for row in step.values()):
            for name, amount in amounts.items():
                found[name] += amount
        return found


STEP = st.fixed_dictionaries(
    {
        # Which rows decode, in which order, and which of them have a new tenant.
        "rows": st.lists(st.integers(1, ROWS - 1), unique=True, max_size=ROWS - 1),
        "arrivals": st.sets(st.integers(1, ROWS - 1)),
        # Totals outgrow int32 in a few steps of long rows.
        "lens": st.lists(st.sampled_from([1, 63, 64, 65, 1000, 1 << 30]), min_size=ROWS - 1, max_size=ROWS - 1),
        "padding": st.integers(0, 20),
        # Rows whose last step turns out to have been for nothing.
        "discarded": st.lists(st.integers(1, ROWS - 1), unique=True, max_size=3),
        "idle": st.booleans(),
    }
)
LAYERS = st.sampled_from(
    [
        Layers(4, 0, 0),
        Layers(4, 2, 1),
        Layers(64, 61, 2),
        Layers(3, 3, 0),
        Layers(8, 5, 2, scoring=2),
        Layers(3, 0, 2, 2),
    ]
)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_totals_are_right_at_every_step(implementation, device, index_dtype):
    @settings(max_examples={"reference": 200, "triton": 60}[implementation], deadline=None)
    @given(st.lists(STEP, min_size=1, max_size=8), LAYERS)
    def check(steps, layers):
        ledger = Ledger.empty(ROWS, device)
        accounts, generations = Accounts(), [0] * ROWS
        for number, step in enumerate(steps):
            for row in step["arrivals"]:
                generations[row] += 1
            # A new tenant of row 0 must not be counted either.
            generations[0] += 1
            lens = step["lens"][: len(step["rows"])]
            rows = step["rows"] + [0] * (step["padding"] if step["rows"] else step["padding"] + 1)
            count_decode_step(
                ledger,
                torch.tensor(rows, dtype=index_dtype, device=device),
                torch.tensor(generations, device=device),
                torch.tensor(lens + [1000] * (len(rows) - len(lens)), dtype=index_dtype, device=device),
                layers,
                budget=64,
                implementation=implementation,
            )
            accounts.step([(row, generations[row]) for row in step["rows"]], lens, layers, 64)
            ledger.discard(torch.tensor(step["discarded"], dtype=torch.int64, device=device))
            for row in step["discarded"]:
                accounts.discard(row)
            assert named(ledger.settled(in_flight=True)) == accounts.totals(number)
            assert named(ledger.settled(in_flight=False)) == accounts.totals(number + 1)
            if step["idle"]:
                ledger.settle()
                accounts.settled()

    check()


def test_what_groups_share_is_added_up(implementation, device):
    ledger = Ledger.empty(ROWS, device)
    slots = torch.arange(1, 65, dtype=torch.int32, device=device).repeat(5, 1)
    slots[1, 50:] += 100
    slots[2] += 200
    slots[3, 17:] += 300
    slots[4] = 0  # a padded row
    lens = torch.tensor([60, 58, 40, 64, 1], device=device)
    groups = find_prefix_groups(slots, lens, granule=8, implementation=implementation)
    rows, tenants = torch.tensor([1, 2, 3, 4, 0], device=device), torch.ones(ROWS, dtype=torch.int64, device=device)
    for _ in range(2):
        count_decode_step(
            ledger,
            rows,
            tenants,
            lens,
            Layers(5, sparse=2, selecting=1),
            budget=64,
            sharing=Sharing(groups, layers=3),
            implementation=implementation,
        )
    totals = named(ledger.settled(in_flight=False))
    assert totals["tokens_shared"] == 2 * 3 * (48 + 16)
    assert totals["rows_grouped"] == 2 * 3


@pytest.mark.parametrize("scoring", [0, 1])
def test_what_layers_that_attend_to_sets_share_is_added_up(implementation, device, scoring):
    ledger = Ledger.empty(ROWS, device)
    slots = torch.arange(1, 65, dtype=torch.int32, device=device).repeat(4, 1)
    slots[1, 32:] += 100
    slots[2, 48:] += 200
    slots[3] = 0  # a padded row
    lens = torch.tensor([60, 34, 64, 1], device=device)
    groups = find_prefix_groups(slots, lens, granule=16, implementation=implementation)
    sizes = {"budget": 16, "implementation": implementation}
    in_sets, counts = groups_of_sets(lens, groups, SetSizes(16, recent=4, sinks=2), implementation=implementation)
    # Of three rows' 32 tokens as many are chosen as leave row 2 its window of 4 and of the 8 that are not forced
    # floor(8 * 28 / 56); of the 16 more that rows 0 and 2 share as many as leave 4 + floor(4 * 12 / 28) of 8. Row 1 has
    # two tokens beyond.
    assert in_sets.already_read.tolist() == [0, 8, 11, 0] and counts.tolist() == [16, 10, 16, 1]
    rows, tenants = torch.tensor([1, 2, 3, 0], device=device), torch.ones(ROWS, dtype=torch.int64, device=device)
    layers, sharing = Layers(5, sparse=2, selecting=1, scoring=scoring), Sharing(groups, 3, in_sets, counts)
    for _ in range(2):
        count_decode_step(ledger, rows, tenants, lens, layers, sharing=sharing, **sizes)
    totals, attending = named(ledger.settled(in_flight=False)), 2 + scoring
    assert totals["tokens_shared"] == 2 * (3 * (32 + 48) + attending * (8 + 11))
    assert totals["tokens_attended"] == 2 * ((5 - attending) * (60 + 34 + 64) + attending * (16 + 10 + 16))
    assert totals["tokens_scored"] == 2 * scoring * (60 + 34 + 64)


@pytest.mark.parametrize("scoring", [0, 1])
@pytest.mark.parametrize("sparse_layers", [2, 0])
def test_rows_that_have_a_set_attend_to_it_where_their_action_says(implementation, device, sparse_layers, scoring):
    ledger = Ledger.empty(ROWS, device)
    actions = [KEEP, SELECT, RECALL, KEEP | EARLY, SELECT | EARLY, SELECT | RECALL | EARLY]
    lens = [100 + n for n in range(6)]
    count_decode_step(
        ledger,
        torch.tensor([1, 2, 3, 4, 5, 6], device=device),
        torch.ones(ROWS, dtype=torch.int64, device=device),
        torch.tensor(lens, device=device),
        Layers(3 + sparse_layers, sparse=sparse_layers, selecting=1, scoring=scoring, early=2),
        budget=64,
        actions=torch.tensor(actions, dtype=torch.uint8, device=device),
        implementation=implementation,
    )
    attended = 0
    for action, length in zip(actions, lens, strict=True):
        selection = length if action & SELECT and not scoring else 64
        attended += (2 * 64 if action & EARLY else 2 * length) + selection + sparse_layers * 64
    totals = named(ledger.settled(in_flight=False))
    assert totals["tokens_attended"] == attended
    assert totals["tokens_scored"] == scoring * sum(
        n for action, n in zip(actions, lens, strict=True) if action & SELECT
    )
    assert totals["selections"] == 3
    assert totals["warm_starts"] == 2


def test_bad_operands_are_named():
    ledger, sizes = Ledger.empty(4, "cpu"), {"layers": Layers(2, 1, 1), "budget": 64}
    ones = torch.ones(2, dtype=torch.int64)
    groups = find_prefix_groups(torch.zeros(2, 8, dtype=torch.int32), ones, granule=4)
    with pytest.raises(ValueError, match=r"rows and seq_lens \[B\]"):
        count_decode_step(ledger, ones, torch.zeros(4), ones[:1], **sizes)
    with pytest.raises(ValueError, match=r"generations \[4\]"):
        count_decode_step(ledger, ones, torch.zeros(3), ones, **sizes)
    with pytest.raises(ValueError, match="in_sets and set_counts together"):
        count_decode_step(ledger, ones, torch.zeros(4), ones, **sizes, sharing=Sharing(groups, 1, set_counts=ones))
    with pytest.raises(ValueError, match="implementation among"):
        count_decode_step(ledger, ones, torch.zeros(4), ones, **sizes, implementation="numpy")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kv_heads", [None, 1, 3, 8])
def test_sets_that_are_shorter_than_the_budget_are_counted_as_long_as_they_are(
    implementation, device, kv_heads, index_dtype
):
    generator = torch.Generator().manual_seed(7)
    rows = torch.tensor([3, 0, 1, 6, 0, 2, 5])
    lens = torch.tensor([700, 1, 64, 65, 900, 5000, 12])
    shape = (7,) if kv_heads is None else (7, kv_heads)
    counts = torch.randint(1, 65, shape, generator=generator).clamp(max=lens.view(-1, *[1] * (len(shape) - 1)))
    ledger = Ledger.empty(ROWS, device)
    operands = [tensor.to(index_dtype).to(device) for tensor in (rows, lens)]
    tenants = torch.ones(ROWS, dtype=torch.int64, device=device)
    how = {"budget": 64, "implementation": implementation}
    for _ in range(2):
        count_decode_step(ledger, operands[0], tenants, operands[1], Layers(6, sparse=5, selecting=1), **how)
    whole = ledger.settled(in_flight=False)
    count_sets(ledger, *operands, counts.int().to(device), layers=5, **how)
    sets = counts.view(7, -1)
    short = [-(-5 * (min(int(lens[n]), 64) * sets.shape[1] - int(sets[n].sum())) // sets.shape[1]) for n in range(7)]
    less = whole - ledger.settled(in_flight=False)
    expected = sum(n for n, row in zip(short, rows.tolist(), strict=True) if row)
    assert named(less) == dict.fromkeys(TOTALS, 0) | {"tokens_attended": expected}
    # What is thrown away is what was counted.
    ledger.discard(rows[rows != 0].to(device))
    assert named(ledger.settled(in_flight=False)) == named(ledger.settled(in_flight=True))


def test_bad_set_counts_are_named():
    ledger = Ledger.empty(3, "cpu")
    rows = torch.ones(2, dtype=torch.int64)
    for bad, message in ((torch.ones(3).int(), r"set_counts \[2\] or \[2, H_kv\]"), (torch.ones(2), "int32")):
        with pytest.raises(ValueError, match=message):
            count_sets(ledger, rows, rows, bad, budget=4, layers=1)
