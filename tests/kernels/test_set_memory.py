"""Do both implementations of the memory of sets decide, recall, place and keep what a plain account says?"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lim_kernels import SetSizes, decide_actions, keep_sets, place_sets
from lim_kernels.row_actions import EARLY, KEEP, RECALL, SELECT
from lim_kernels.set_memory import SetMemory

EXAMPLES = {"reference": 120, "triton": 30}
POISON = -77


def memory_of(layers, num_rows, num_slots, middle, device):
    """A memory in which nothing is known, and sets that nobody stored are recognised."""
    return SetMemory(
        sets=torch.full((layers, num_rows, middle), POISON, dtype=torch.int32, device=device),
        stamps=torch.zeros(layers, num_slots, dtype=torch.int32, device=device),
        tenants=torch.full((num_rows,), -1, dtype=torch.int64, device=device),
        lengths=torch.zeros(num_rows, dtype=torch.int32, device=device),
        ages=torch.zeros(num_rows, dtype=torch.int32, device=device),
        clock=torch.zeros(1, dtype=torch.int32, device=device),
    )


class Account:
    """What is known, in dictionaries."""

    def __init__(self, layers, budget, recent, sinks, interval, early):
        self.layers, self.budget, self.recent, self.sinks = layers, budget, recent, sinks
        self.middle = budget - recent - sinks
        self.interval, self.early = interval, early
        self.stamps = [{} for _ in range(layers)]
        self.rows = {}  # row: (tenant, length, age, sets or None)
        self.clock = 0

    def known(self, layer, slots):
        """Times of the candidates among a row's slots, by position."""
        candidates = range(self.sinks, len(slots) - self.recent)
        return {t: self.stamps[layer][slots[t]] for t in candidates if slots[t] in self.stamps[layer]}

    def begin(self, batch):
        """Acts of [(row, tenant, slots)], and the ranked parts of the sets that rows have, by layer."""
        self.clock += 1
        for row, _, slots in batch:
            for stamps in self.stamps if row else ():
                stamps.pop(slots[-1], None)
        actions, had = [], []
        for row, tenant, slots in batch:
            length = len(slots)
            if row == 0 or length <= self.budget:
                actions.append(SELECT)
                had.append(None)
                if row:
                    self.rows[row] = (tenant, length, 0, None)
                continue
            who, before, age, sets = self.rows.get(row, (None, 0, 0, None))
            mine, recalled = who == tenant and length > before, False
            if not mine:
                known = [self.known(layer, slots) for layer in range(self.layers)]
                recalled = all(len(times) >= self.middle for times in known)
                sets = None
                if recalled:
                    ranked = [sorted(times, key=lambda t, times=times: (-times[t], t)) for times in known]
                    sets = [sorted(order[: self.middle]) for order in ranked]
                age = 0
            else:
                age += length - before
            keeps = sets is not None and self.interval > 1 and (recalled or age < self.interval)
            action = (KEEP if keeps else SELECT) | (RECALL if recalled else 0)
            actions.append(action | (EARLY if self.early and sets is not None else 0))
            had.append(sets)
            self.rows[row] = (tenant, length, age if keeps and not recalled else 0, sets)
        return actions, had

    def chose(self, row, layer, slots, ranked):
        tenant, length, age, sets = self.rows[row]
        sets = list(sets) if sets is not None else [None] * self.layers
        sets[layer] = ranked
        self.rows[row] = (tenant, length, age, sets)
        for position in ranked:
            self.stamps[layer][slots[position]] = self.clock


def in_slots(account, slots, ranked):
    length = len(slots)
    return [*slots[: account.sinks], *(slots[t] for t in ranked), *slots[length - account.recent : length]]


SHAPES = st.sampled_from(
    # budget, recent, sinks: no sinks, no window, nothing ranked, and no power of two.
    [(7, 2, 1), (16, 4, 2), (9, 0, 0), (5, 5, 0), (33, 1, 3), (12, 0, 4)]
)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_every_step_is_the_account_s(implementation, device, index_dtype):
    @settings(max_examples=EXAMPLES[implementation], deadline=None)
    @given(SHAPES, st.integers(1, 3), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2**31))
    def check(sizes, layers, interval, early, seed):
        run_steps(sizes, layers, interval, early, random.Random(seed), implementation, device, index_dtype)

    check()


def run_steps(shape, layers, interval, early, draw, implementation, device, index_dtype):
    """Requests come, fork, grow, leave rows and slots to others; each step is compared."""
    sizes, num_rows, num_slots = SetSizes(*shape), 6, 700
    memory = memory_of(layers, num_rows, num_slots, sizes.middle, device)
    account = Account(layers, *shape, interval, early)
    free, tenancy, live = list(range(1, num_slots)), [0] * num_rows, {}
    draw.shuffle(free)

    def take(count):
        """Slots that a prefill writes."""
        taken = [free.pop() for _ in range(count)]
        written = torch.tensor(taken, dtype=torch.long, device=device)
        memory.stamps.index_fill_(1, written, 0)
        for stamps in account.stamps:
            for slot in taken:
                stamps.pop(slot, None)
        return taken

    for _ in range(draw.randint(3, 9)):
        for row in range(1, num_rows):
            if row in live and draw.random() < 0.2:
                left = set(live.pop(row)).difference(*live.values())
                # What they know stays until they are written.
                free.extend(sorted(left))
            elif row not in live and draw.random() < 0.6:
                tenancy[row] += 1
                shared = draw.choice(list(live.values()))[:-1] if live and draw.random() < 0.7 else []
                live[row] = [*shared[: draw.randint(0, len(shared))], *take(draw.randint(1, 30))]
        chosen_rows = [row for row in live if draw.random() < 0.8]
        for row in chosen_rows:
            # A mixed step may have come before.
            live[row] = live[row] + take(draw.choice([0, 0, 0, 1])) + [free.pop()]
        batch = [(row, tenancy[row], live[row]) for row in chosen_rows]
        batch += [(0, tenancy[0], [0] * draw.choice([1, 40]))] * draw.randint(0 if batch else 1, 2)
        one_step(account, memory, batch, tenancy, sizes, interval, early, draw, implementation, device, index_dtype)


def one_step(account, memory, batch, tenancy, sizes, interval, early, draw, implementation, device, index_dtype):
    budget, count = sizes.budget, len(batch)
    how = {"implementation": implementation}
    width = max(len(slots) for *_, slots in batch) + draw.randint(0, 5)
    # What lies beyond a row's end may be another request's.
    extended = torch.randint(0, 700, (count, budget + width + 3), dtype=torch.int32)[:, : budget + width]
    for n, (*_, slots) in enumerate(batch):
        extended[n, budget : budget + len(slots)] = torch.tensor(slots)
    extended = extended.to(device)
    rows = torch.tensor([row for row, *_ in batch], dtype=index_dtype, device=device)
    lens = [len(slots) for *_, slots in batch]
    seq_lens = torch.tensor(lens, dtype=index_dtype, device=device)
    owners = torch.tensor(tenancy, device=device)
    slots_view, room = extended[:, budget:], extended[:, :budget].clone()

    decided = decide_actions(memory, rows, owners, slots_view, seq_lens, sizes, **how, interval=interval, early=early)
    actions, had = account.begin(batch)
    assert decided.actions.tolist() == actions
    uses_set = [(action & SELECT) == 0 for action in actions]
    early_uses_set = [(action & EARLY) != 0 for action in actions]
    assert decided.choose_lens.tolist() == [1 if alone else n for alone, n in zip(uses_set, lens, strict=True)]
    for flags, ends, expected in (
        (decided.select_uses_set, decided.select_ends, uses_set),
        (decided.early_uses_set, decided.early_ends, early_uses_set),
    ):
        assert flags.tolist() == expected
        assert ends.tolist() == [budget + (0 if alone else n) for alone, n in zip(expected, lens, strict=True)]

    place_sets(memory, 0, rows, decided.actions, extended, seq_lens, sizes, **how)
    assert torch.equal(extended[:, budget:], slots_view)
    for layer in range(account.layers):
        for n, (_, _, slots) in enumerate(batch):
            if uses_set[n] or (early_uses_set[n] and layer == 0):
                assert extended[n, :budget].tolist() == in_slots(account, slots, had[n][layer])
            elif layer == 0:
                assert torch.equal(extended[n, :budget], room[n])
        chosen = torch.full((count, budget), 1 << 30, dtype=torch.int32)
        expected = []
        for n, (row, _, slots) in enumerate(batch):
            if uses_set[n]:
                expected.append(in_slots(account, slots, had[n][layer]))
                continue
            kept = list(range(len(slots)))
            if len(slots) > budget:
                first, last = sizes.sinks, len(slots) - sizes.recent
                ranked = sorted(draw.sample(range(first, last), account.middle))
                kept = [*range(first), *ranked, *range(last, len(slots))]
                if row:
                    account.chose(row, layer, slots, ranked)
            chosen[n, : len(kept)] = torch.tensor(kept)
            chosen[n, len(kept) :] = -1
            expected.append([slots[t] for t in kept])
        sets, counts = keep_sets(
            memory, layer, rows, decided.actions, extended, seq_lens, chosen.to(device), sizes, **how
        )
        assert counts.tolist() == [min(n, budget) for n in lens]
        for n, kept in enumerate(expected):
            assert sets[n].tolist() == kept + [0] * (budget - len(kept))
    check_memory(account, memory)


def check_memory(account, memory):
    """What the slots know is the account's, padding aside, and so are the sets that tenants have."""
    assert memory.clock.tolist() == [account.clock]
    for layer, stamps in enumerate(account.stamps):
        known = memory.stamps[layer].nonzero().view(-1).tolist()
        assert {slot: int(memory.stamps[layer, slot]) for slot in known if slot} == stamps
        for row, (tenant, length, age, sets) in account.rows.items():
            assert (int(memory.tenants[row]), int(memory.lengths[row])) == (tenant, length)
            if sets is not None:
                assert int(memory.ages[row]) == age
                assert memory.sets[layer, row].tolist() == sets[layer]
    assert (memory.sets[:, 0] == POISON).all() and int(memory.tenants[0]) == -1


@pytest.mark.parametrize(
    ("times", "middle"),
    [
        ([5] * 40, 17),
        ([1, 2_000_000_000] * 20, 21),
        ([*range(1, 41)], 40),
        ([2_147_483_646, 2_147_483_647] * 20, 3),
        ([*range(40, 0, -1)], 1),
        ([*range(1, 41), *range(1, 41)], 31),
    ],
    ids=["all-tied", "far-uses_set", "all", "latest", "one", "twice"],
)
def test_the_latest_are_recalled_however_times_lie(implementation, device, times, middle):
    memory = memory_of(1, 2, 2100, middle, device)
    # Known slots are scattered over a row of more than one block.
    places = sorted(random.Random(0).sample(range(2, 1500), len(times)))
    slots = torch.randperm(2099, device=device)[:1503].int().unsqueeze(0) + 1
    memory.stamps[0, slots[0, places].long()] = torch.tensor(times, dtype=torch.int32, device=device)
    tenants = torch.ones(2, dtype=torch.int64, device=device)
    decided = decide_actions(
        memory,
        torch.tensor([1], device=device),
        tenants,
        slots,
        torch.tensor([1503], device=device),
        SetSizes(middle + 5, recent=3, sinks=2),
        interval=3,
        early=False,
        implementation=implementation,
    )
    assert decided.actions.tolist() == [RECALL]
    ranked = sorted(range(len(times)), key=lambda n: (-times[n], n))[:middle]
    assert memory.sets[0, 1].tolist() == sorted(places[n] for n in ranked)


def test_a_step_s_own_slots_know_nothing_of_their_last_owner(implementation, device):
    memory = memory_of(2, 3, 40, 4, device)
    slots = torch.arange(1, 31, dtype=torch.int32, device=device).view(2, 15)
    memory.stamps[:, slots[:, [1, 3, 5, 7]].flatten().long()] = 3
    memory.stamps[:, slots[:, 9].long()] = 8
    how = {"interval": 2, "early": True, "implementation": implementation}
    tenants, lens = torch.zeros(3, dtype=torch.int64, device=device), torch.tensor([10, 10], device=device)
    sizes = SetSizes(4, recent=0, sinks=0)
    decided = decide_actions(memory, torch.tensor([1, 2], device=device), tenants, slots, lens, sizes, **how)
    assert decided.actions.tolist() == [RECALL | EARLY] * 2
    assert memory.sets[:, 1:].tolist() == [[[1, 3, 5, 7]] * 2] * 2
    assert not memory.stamps[:, slots[:, 9].long()].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, 9, dtype=torch.int64)}, "slots int32"),
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"seq_lens \[2\]"),
        ({"rows": torch.ones(3, dtype=torch.int64)}, r"rows \[2\]"),
        ({"tenants": torch.ones(4, dtype=torch.int32)}, r"tenants int64 \[4\]"),
        ({"interval": 0}, "an interval of at least 1"),
        ({"sizes": SetSizes(6, recent=2, sinks=2)}, "sets of 2 ranked tokens"),
        ({"implementation": "cuda"}, "implementation among"),
    ],
)
def test_bad_operands_are_named(change, message):
    call = {
        "memory": memory_of(1, 4, 9, 3, "cpu"),
        "rows": torch.ones(2, dtype=torch.int64),
        "tenants": torch.ones(4, dtype=torch.int64),
        "slots": torch.ones(2, 9, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "sizes": SetSizes(6, recent=2, sinks=1),
        "interval": 2,
        "early": False,
    }
    with pytest.raises(ValueError, match=message):
        decide_actions(**{**call, **change})


def test_bad_layers_and_sets_are_named():
    memory, rows = memory_of(1, 4, 9, 3, "cpu"), torch.ones(2, dtype=torch.int64)
    actions, lens = torch.ones(2, dtype=torch.uint8), torch.ones(2, dtype=torch.int32)
    extended, sizes = torch.ones(2, 15, dtype=torch.int32), SetSizes(6, recent=2, sinks=1)
    with pytest.raises(ValueError, match="a layer below 1, got 1"):
        place_sets(memory, 1, rows, actions, extended, lens, sizes)
    with pytest.raises(ValueError, match="contiguous actions uint8"):
        place_sets(memory, 0, rows, actions.long(), extended, lens, sizes)
    with pytest.raises(ValueError, match=r"chosen int32 \[2, 6\]"):
        keep_sets(memory, 0, rows, actions, extended, lens, torch.ones(2, 5, dtype=torch.int32), sizes)
