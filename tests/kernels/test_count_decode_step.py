"""Are a step's accounts right whatever requests come, stay and leave, with every implementation?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, count_decode_step, count_sets, find_prefix_groups, groups_of_sets
from lim_kernels.count_decode_step import TOTALS, Ledger
from lim_kernels.row_actions import EARLY, KEEP, RECALL, SELECT

ROWS = 7


class Accounts:
    """What the totals should be, from one dictionary a tenant."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(TOTALS, 0)
        self.outgrew: dict[tuple[int, int], bool] = {}

    def step(self, tenants, lens, *, budget, num_layers, sparse_layers, selection_layers):
        self.totals["decode_steps"] += bool(tenants)
        for tenant, length in zip(tenants, lens, strict=True):
            sparse = sparse_layers > 0 and length > budget
            self.totals["tokens_attended"] += (num_layers - sparse_layers) * length
            self.totals["tokens_attended"] += sparse_layers * min(length, budget)
            self.totals["tokens_dense"] += num_layers * length
            self.totals["selections"] += selection_layers * sparse
            self.totals["requests"] += tenant not in self.outgrew
            self.totals["requests_sparse"] += sparse and not self.outgrew.get(tenant, False)
            self.outgrew[tenant] = sparse or self.outgrew.get(tenant, False)


STEP = st.fixed_dictionaries(
    {
        # Which rows decode, in which order, and which of them have a new tenant.
        "rows": st.lists(st.integers(1, ROWS - 1), unique=True, max_size=ROWS - 1),
        "arrivals": st.sets(st.integers(1, ROWS - 1)),
        # Totals outgrow int32 in a few steps of long rows.
        "lens": st.lists(st.sampled_from([1, 63, 64, 65, 1000, 1 << 30]), min_size=ROWS - 1, max_size=ROWS - 1),
        "padding": st.integers(0, 20),
    }
)
LAYERS = st.sampled_from([(4, 0, 0), (4, 2, 1), (64, 61, 2), (3, 3, 0)])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_totals_are_right_at_every_step(implementation, device, index_dtype):
    @settings(max_examples={"reference": 200, "triton": 60}[implementation], deadline=None)
    @given(st.lists(STEP, min_size=1, max_size=8), LAYERS)
    def check(steps, layers):
        sizes = dict(zip(("num_layers", "sparse_layers", "selection_layers"), layers, strict=True)) | {"budget": 64}
        ledger = Ledger(
            torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
            torch.full((ROWS,), -1, dtype=torch.int64, device=device),
            torch.zeros(ROWS, dtype=torch.uint8, device=device),
        )
        accounts, generations = Accounts(), [0] * ROWS
        for step in steps:
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
                **sizes,
                implementation=implementation,
            )
            accounts.step([(row, generations[row]) for row in step["rows"]], lens, **sizes)
            assert dict(zip(TOTALS, ledger.totals.tolist(), strict=True)) == accounts.totals

    check()


def test_what_groups_share_is_added_up(implementation, device):
    ledger = Ledger(
        torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
        torch.full((ROWS,), -1, dtype=torch.int64, device=device),
        torch.zeros(ROWS, dtype=torch.uint8, device=device),
    )
    slots = torch.arange(1, 65, dtype=torch.int32, device=device).repeat(5, 1)
    slots[1, 50:] += 100
    slots[2] += 200
    slots[3, 17:] += 300
    slots[4] = 0  # a padded row
    lens = torch.tensor([60, 58, 40, 64, 1], device=device)
    groups = find_prefix_groups(slots, lens, granule=8, implementation=implementation)
    rows, tenants = torch.tensor([1, 2, 3, 4, 0], device=device), torch.ones(ROWS, dtype=torch.int64, device=device)
    sizes = {"budget": 64, "num_layers": 5, "sparse_layers": 2, "selection_layers": 1}
    for _ in range(2):
        count_decode_step(
            ledger, rows, tenants, lens, **sizes, groups=groups, grouped_layers=3, implementation=implementation
        )
    totals = dict(zip(TOTALS, ledger.totals.tolist(), strict=True))
    assert totals["tokens_shared"] == 2 * 3 * (48 + 16)
    assert totals["rows_grouped"] == 2 * 3


def test_what_sparse_layers_share_is_added_up(implementation, device):
    ledger = Ledger(
        torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
        torch.full((ROWS,), -1, dtype=torch.int64, device=device),
        torch.zeros(ROWS, dtype=torch.uint8, device=device),
    )
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
    layers = {"num_layers": 5, "sparse_layers": 2, "selection_layers": 1, "grouped_layers": 3}
    for _ in range(2):
        count_decode_step(
            ledger, rows, tenants, lens, **layers, groups=groups, set_groups=in_sets, set_counts=counts, **sizes
        )
    totals = dict(zip(TOTALS, ledger.totals.tolist(), strict=True))
    assert totals["tokens_shared"] == 2 * (3 * (32 + 48) + 2 * (8 + 11))
    assert totals["tokens_attended"] == 2 * (3 * (60 + 34 + 64) + 2 * (16 + 10 + 16))


@pytest.mark.parametrize("sparse_layers", [2, 0])
def test_rows_that_have_a_set_attend_to_it_where_their_action_says(implementation, device, sparse_layers):
    ledger = Ledger(
        torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
        torch.full((ROWS,), -1, dtype=torch.int64, device=device),
        torch.zeros(ROWS, dtype=torch.uint8, device=device),
    )
    actions = [KEEP, SELECT, RECALL, KEEP | EARLY, SELECT | EARLY, SELECT | RECALL | EARLY]
    lens = [100 + n for n in range(6)]
    layers = {"num_layers": 3 + sparse_layers, "sparse_layers": sparse_layers, "selection_layers": 1}
    count_decode_step(
        ledger,
        torch.tensor([1, 2, 3, 4, 5, 6], device=device),
        torch.ones(ROWS, dtype=torch.int64, device=device),
        torch.tensor(lens, device=device),
        budget=64,
        **layers,
        actions=torch.tensor(actions, dtype=torch.uint8, device=device),
        early_layers=2,
        implementation=implementation,
    )
    attended = 0
    for action, length in zip(actions, lens, strict=True):
        selection = length if action & SELECT else 64
        attended += (2 * 64 if action & EARLY else 2 * length) + selection + sparse_layers * 64
    totals = dict(zip(TOTALS, ledger.totals.tolist(), strict=True))
    assert totals["tokens_attended"] == attended
    assert totals["selections"] == 3
    assert totals["warm_starts"] == 2


def test_bad_operands_are_named():
    ledger = Ledger(torch.zeros(len(TOTALS)), torch.zeros(4), torch.zeros(4))
    sizes = {"budget": 64, "num_layers": 2, "sparse_layers": 1, "selection_layers": 1}
    ones = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rows and seq_lens \[B\]"):
        count_decode_step(ledger, ones, torch.zeros(4), ones[:1], **sizes)
    with pytest.raises(ValueError, match=r"generations \[4\]"):
        count_decode_step(ledger, ones, torch.zeros(3), ones, **sizes)
    with pytest.raises(ValueError, match="set_groups and set_counts beside groups"):
        count_decode_step(ledger, ones, torch.zeros(4), ones, **sizes, set_counts=ones)
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
    ledger = Ledger(
        torch.arange(100, 109, dtype=torch.int64, device=device),
        torch.full((ROWS,), -1, dtype=torch.int64, device=device),
        torch.zeros(ROWS, dtype=torch.uint8, device=device),
    )
    operands = (tensor.to(index_dtype).to(device) for tensor in (rows, lens))
    count_sets(ledger, *operands, counts.int().to(device), budget=64, layers=5, implementation=implementation)
    sets = counts.view(7, -1)
    short = sum(5 * (min(int(lens[n]), 64) * sets.shape[1] - int(sets[n].sum())) for n in range(7) if rows[n] != 0)
    expected = [*range(100, 109)]
    expected[TOTALS.index("tokens_attended")] -= -(-short // sets.shape[1])
    assert ledger.totals.tolist() == expected


def test_bad_set_counts_are_named():
    ledger = Ledger(torch.zeros(9, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    rows = torch.ones(2, dtype=torch.int64)
    for bad, message in ((torch.ones(3).int(), r"set_counts \[2\] or \[2, H_kv\]"), (torch.ones(2), "int32")):
        with pytest.raises(ValueError, match=message):
            count_sets(ledger, rows, rows, bad, budget=4, layers=1)
