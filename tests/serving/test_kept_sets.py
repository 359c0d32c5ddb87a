"""Sets that outlive a step: who may use which, and that nobody gets what belonged to somebody else.

`RADIX_SCHEDULES` sets how many schedules run; a failure names its seed.
"""

import itertools
import os
import random

import pytest
import torch

pytest.importorskip("sglang.srt.mem_cache.radix_cache")

from lim_kernels import sparse_decode
from lim_kernels.row_actions import EARLY, KEEP, RECALL, SELECT
from lim_patches.row_generations import keep_generations
from sgl_lim.methods import Role
from support.driven_layers import score_rows_at_once, whole_rows
from support.fake_backend import BUDGET, EXTEND, HEADS, attention, batch_of, build, queries, run_role
from support.radix_world import RadixWorld, random_schedule, sglang_config

SCHEDULES = int(os.environ.get("RADIX_SCHEDULES", "200"))
SINKS, RECENT = 2, 2
MIDDLE = BUDGET - SINKS - RECENT
PROMPT = [0, 1, 2, 1] * 8


@pytest.fixture(scope="module", autouse=True)
def _config():
    """SGLang's configuration, and our hook on its request pool."""
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    clear = ReqToTokenPool.clear
    with sglang_config(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReqToTokenPool, "clear", lambda pool: keep_generations(clear, pool))
        yield


class Driven:
    """A backend that is shown every prefill and decode step of a world, beside a plain account of what it may know."""

    def __init__(self, world, interval, granule=4, early=False, attends="context"):
        self.world, self.interval, self.early, self.attends = world, interval, early, attends
        num_slots = len(world.filled)
        how = {"selection_interval": interval, "early_sets": early, "selection_attends": attends}
        self.backend = build(world.table, granule=granule, num_slots=num_slots, **how)
        self.backend.lim.rows.req_generation = world.generations
        self.filled = world.filled.clone()
        self.sets = {}  # tenancy of a row: [positions of the middle, steps since it selected, length]
        self.decoding = set()  # tenancies that have decoded
        self.selected_at = {}  # slot and tenancy: step
        self.clock = 0

    def prefilled(self):
        """Show the backend the slots that a prefill has just written."""
        written = (self.world.filled != self.filled).nonzero().view(-1)
        self.filled = self.world.filled.clone()
        if len(written):
            self.backend.init_forward_metadata(batch_of([1], [1], mode=EXTEND, written=written.tolist()))

    def expected_action(self, request, slots):
        length = len(slots)
        if length <= BUDGET:
            return SELECT
        early = EARLY if self.early else 0
        kept = self.sets.get(self.tenancy(request))
        if kept is not None:
            return early | (KEEP if kept[1] + length - kept[2] < self.interval else SELECT)
        known = [self.when(slot) for slot in slots[SINKS : length - RECENT]]
        if self.tenancy(request) in self.decoding or sum(at is not None for at in known) < MIDDLE:
            return SELECT
        return early | RECALL | (SELECT if self.interval == 1 else 0)

    def tenancy(self, request):
        return request.row, int(self.world.generations[request.row])

    def when(self, slot):
        """The step in which a slot was selected last under its present owner, or None."""
        return self.selected_at.get((slot, int(self.world.filled[slot])))

    def expected_set(self, action, request, slots):
        if not action & RECALL:
            middle = [slots[position] for position in self.sets[self.tenancy(request)][0]]
        else:
            candidates = slots[SINKS : len(slots) - RECENT]
            ranked = sorted(range(len(candidates)), key=lambda n: (-(self.when(candidates[n]) or -1), n))
            middle = [candidates[n] for n in sorted(ranked[:MIDDLE])]
        return slots[:SINKS] + middle + slots[len(slots) - RECENT :]

    def decoded(self, requests):
        """Run a decode step of these requests, whose new tokens have slots, and compare it with the account."""
        if not requests:
            return []
        self.clock += 1
        self.filled = self.world.filled.clone()
        lens = [request.length for request in requests]
        rows = [self.world.table[request.row, :length].tolist() for request, length in zip(requests, lens, strict=True)]
        self.backend.init_forward_metadata(
            batch_of([request.row for request in requests], lens, written=[slots[-1] for slots in rows])
        )
        plan = self.backend.lim.plan
        actions = [self.expected_action(request, slots) for request, slots in zip(requests, rows, strict=True)]
        assert plan.kept.actions.tolist() == actions
        self.check_memory()
        # Recalled before any layer runs, so nothing that this step selects is in them.
        expected = [
            self.expected_set(action, request, slots) if action != SELECT else None
            for action, request, slots in zip(actions, requests, rows, strict=True)
        ]
        if self.early:
            self.check_early_layer(plan, rows, actions, expected)
        outputs = attention(self.backend, plan, len(requests))
        self.check_attention(plan, rows, actions, outputs[0])
        for n, (request, slots, action) in enumerate(zip(requests, rows, actions, strict=True)):
            chosen = whole_rows(plan)[n]
            self.decoding.add(self.tenancy(request))
            if len(slots) <= BUDGET:
                assert chosen == slots
                continue
            assert len(chosen) == BUDGET
            if not action & SELECT:
                assert chosen == expected[n]
            middle = chosen[SINKS : BUDGET - RECENT]
            tenancy = self.tenancy(request)
            kept = not action & (SELECT | RECALL)
            age = self.sets[tenancy][1] + len(slots) - self.sets[tenancy][2] if kept else 0
            self.sets[tenancy] = [[slots.index(slot) for slot in middle], age, len(slots)]
            if action & SELECT:
                for slot in middle:
                    self.selected_at[slot, int(self.world.filled[slot])] = self.clock
        return actions

    def check_memory(self):
        """Each slot of a live request remembers its own selections and nobody else's."""
        stamps = self.backend.lim.kept_sets.memory.stamps[0]
        for request in self.world.live:
            slots = self.world.table[request.row, : request.length].tolist()
            assert [int(stamps[slot]) for slot in slots] == [self.when(slot) or 0 for slot in slots]

    def check_attention(self, plan, rows, actions, out):
        """Rows that do not select attend to their sets, in the selection layer as well; with "set" all rows do."""
        attended = [
            slots if action & SELECT and self.attends == "context" else chosen
            for slots, action, chosen in zip(rows, actions, whole_rows(plan), strict=True)
        ]
        self.check_output(attended, out)

    def check_early_layer(self, plan, rows, actions, expected):
        """A layer before the first selection layer attends to the set of the step before, or to what slots remember."""
        out = run_role(self.backend, plan, Role.DENSE, len(rows))
        self.check_output(
            [kept if action & EARLY else slots for kept, slots, action in zip(expected, rows, actions, strict=True)],
            out,
        )

    def check_output(self, attended, out):
        """Each row's output is attention over these slots."""
        q, k, v = queries(len(attended)), self.backend.lim.pool.k, self.backend.lim.pool.v
        for n, slots in enumerate(attended):
            exact, _ = sparse_decode(
                q[n : n + 1].double(),
                k.double(),
                v.double(),
                torch.tensor([slots]),
                torch.tensor([len(slots)]),
                scale=0.3,
            )
            torch.testing.assert_close(out[n : n + 1].double(), exact, rtol=1e-4, atol=1e-5)


def begin(interval, prompts, page=1, early=False):
    """A world with these prompts prefilled and committed, and a backend that has seen it."""
    world = RadixWorld(page, num_slots=384, generator=random.Random(0))
    driven = Driven(world, interval, early=early)
    requests = [add(driven, prompt) for prompt in prompts]
    return world, driven, requests


def add(driven, tokens):
    request = driven.world.admit(tokens)
    assert request is not None
    driven.prefilled()
    driven.world.commit(request)
    return request


def step(driven, requests):
    driven.world.decode(requests)
    return driven.decoded(requests)


def test_a_row_selects_every_nth_step():
    _, driven, requests = begin(3, [PROMPT])
    assert [step(driven, requests)[0] for _ in range(8)] == [SELECT, KEEP, KEEP, SELECT, KEEP, KEEP, SELECT, KEEP]


def test_rows_within_the_budget_keep_everything_and_select_once_they_outgrow_it():
    _, driven, requests = begin(4, [PROMPT[: BUDGET - 2]])
    assert [step(driven, requests)[0] for _ in range(5)] == [SELECT, SELECT, SELECT, KEEP, KEEP]


def test_a_fork_begins_with_what_was_selected_on_its_prefix():
    _, driven, (first,) = begin(4, [PROMPT])
    step(driven, [first])
    # It shares the prompt's slots, of which twelve were selected.
    fork = add(driven, [*PROMPT, 2])
    assert step(driven, [first, fork]) == [KEEP, RECALL]
    assert [step(driven, [first, fork]) for _ in range(3)] == [[KEEP, KEEP], [KEEP, KEEP], [SELECT, KEEP]]
    assert step(driven, [first, fork]) == [KEEP, SELECT]


def test_a_later_turn_and_a_resumed_request_begin_with_what_is_left_of_theirs():
    world, driven, (first,) = begin(8, [PROMPT])
    for _ in range(3):
        step(driven, [first])
    tokens = list(first.tokens)
    world.finish(first)
    turn = add(driven, [*tokens, 1, 0])
    assert step(driven, [turn]) == [RECALL]
    world.retract(turn)
    resumed = world.resume(turn)
    driven.prefilled()
    world.commit(resumed)
    assert step(driven, [resumed]) == [RECALL]


def test_tokens_of_mixed_steps_count_towards_the_next_selection():
    """A mixed step is dense, and this backend is not asked to decode its rows."""
    world, driven, (first,) = begin(4, [PROMPT])
    actions = []
    for _ in range(6):
        actions += step(driven, [first])
        world.decode([first])
        driven.prefilled()
    assert actions == [SELECT, KEEP, SELECT, KEEP, SELECT, KEEP]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_rows_that_are_scored_some_at_a_time_attend_to_their_whole_prefix(at_once, monkeypatch):
    world, driven, requests = begin(2, [[*PROMPT, last] for last in (0, 1, 2)])
    world.decode(requests)
    rows, lens = [request.row for request in requests], [request.length for request in requests]
    written = [int(world.table[row, length - 1]) for row, length in zip(rows, lens, strict=True)]
    score_rows_at_once(monkeypatch, at_once, heads=HEADS, width=max(lens))
    driven.backend.init_forward_metadata(batch_of(rows, lens, written=written))
    plan = driven.backend.lim.plan
    assert plan.context.groups.own_starts.tolist() == [32, 32, 32] and len(plan.select) == -(-3 // at_once)
    outputs = attention(driven.backend, plan, 3)
    alone = build(world.table, granule=None, num_slots=len(world.filled))
    alone.init_forward_metadata(batch_of(rows, lens))
    expected = attention(alone, alone.lim.plan, 3)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(plan.chosen.slots, alone.lim.plan.chosen.slots)


@pytest.mark.parametrize("interval", [1, 3])
def test_early_layers_attend_to_the_set_of_the_step_before(interval):
    _, driven, (first,) = begin(interval, [PROMPT], early=True)
    keeps = {1: SELECT, 3: KEEP}[interval]
    assert step(driven, [first]) == [SELECT]
    assert [step(driven, [first])[0] for _ in range(3)] == [EARLY | keeps] * 2 + [EARLY | SELECT]
    # It shares what was selected, and begins with that.
    fork = add(driven, [*PROMPT, 2])
    recalls = RECALL | (SELECT if interval == 1 else 0)
    assert step(driven, [first, fork]) == [EARLY | keeps, EARLY | recalls]
    assert step(driven, [first, fork]) == [EARLY | keeps] * 2


def test_early_layers_attend_to_everything_until_a_row_that_outgrew_the_budget_has_selected():
    _, driven, requests = begin(1, [PROMPT[: BUDGET - 2]], early=True)
    assert [step(driven, requests)[0] for _ in range(5)] == [SELECT] * 3 + [EARLY | SELECT] * 2


def test_tokens_attended_count_early_layers_as_they_are():
    _, driven, (first,) = begin(1, [PROMPT], early=True)
    for _ in range(3):
        step(driven, [first])
    totals = driven.backend.lim.counters.read()
    # Layer 0 is early, layer 1 selects, layer 2 is sparse.
    lengths = [len(PROMPT) + n for n in (1, 2, 3)]
    assert totals["tokens_attended"] == 2 * sum(lengths) + 3 * BUDGET - sum(lengths[1:]) + 2 * BUDGET
    assert (totals["selections"], totals["warm_starts"]) == (3, 0)


def test_nothing_is_remembered_of_slots_that_were_freed_and_filled_again():
    world, driven, (first,) = begin(8, [PROMPT])
    step(driven, [first])
    world.finish(first)
    world.flush()
    again = add(driven, PROMPT)
    assert step(driven, [again]) == [SELECT]


@pytest.mark.parametrize(
    ("page", "attends", "early"), [*itertools.product((1, 16), ("context",), (False, True)), (1, "set", True)], ids=str
)
def test_any_schedule(page, attends, early):
    seen = dict.fromkeys((KEEP, SELECT, RECALL, *[EARLY] * early), 0)
    for seed in range(SCHEDULES // 2):
        draw = random.Random(seed)
        world = RadixWorld(page, num_slots=draw.choice((96, 192, 384)), generator=draw)
        interval = draw.choice((1, 2, 3, 5) if early else (2, 3, 5))
        driven = Driven(world, interval, granule=draw.choice((1, 4)), early=early, attends=attends)
        done, before = [], {}
        try:
            for name in random_schedule(draw, world):
                done.append(name)
                grown = [request for request in world.running if before.get(request) == request.length - 1]
                if name == "decode" and grown:
                    for action in driven.decoded(grown):
                        for bit in seen:
                            seen[bit] += bool(action & bit) if bit else not action & SELECT
                else:
                    driven.prefilled()
                before = {request: request.length for request in world.running}
        except Exception as error:
            raise AssertionError(f"page size {page}, seed {seed}, after {done}: {error}") from error
    assert min(seen.values()) > SCHEDULES / 4, f"schedules hardly do anything: {seen}"


@pytest.mark.parametrize(("budget", "kept"), [(99, True), (100, False), (1 << 30, False)])
def test_sets_are_not_kept_where_no_row_outgrows_the_budget(budget, kept):
    table = torch.zeros(3, 100, dtype=torch.int32)
    lim = build(table, budget=budget, selection_interval=2, early_sets=True).lim
    assert (lim.kept_sets is not None) == kept and lim.method.budget == budget
