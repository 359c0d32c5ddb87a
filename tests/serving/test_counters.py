"""Counters against a hand count, over tenants of the same row and padded rows."""

import random
from types import SimpleNamespace

import torch

from lim_kernels.row_actions import EARLY, KEEP, RECALL, SELECT
from sgl_lim.serving import metrics, reads
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.reads import Read
from support.driven_layers import build_method, decode_of, plan_of


def record(counters, rows, generations, lens):
    tenants = torch.zeros(8, dtype=torch.int64)
    tenants[rows] = torch.tensor(generations)
    counters.learn_generations(tenants)
    counters.record(torch.tensor(rows), plan_for(lens))


def method_of(name):
    """Of five layers, `lessismore` has 0 dense, 1 and 3 select, 2 and 4 sparse."""
    return build_method(name, budget=10, sinks=2, selection_layers=(1, 3))


def build(name="lessismore", **how):
    method = method_of(name)
    return Counters(method.budget, method.layer_roles(5), num_rows=8, device=torch.device("cpu"), **how)


def plan_for(lens, name="lessismore", slots=None, granule=None, actions=None):
    """The plan of a step of rows of these lengths; `actions` as sets that outlive a step make rows do."""
    decode = decode_of(method_of(name), heads=4)
    slots = torch.arange(len(lens) * 60, dtype=torch.int32).view(len(lens), 60) if slots is None else slots
    plan = plan_of(decode, slots, torch.tensor(lens), granule)
    if actions is not None:
        plan.kept = SimpleNamespace(actions=torch.tensor(actions, dtype=torch.uint8))
    return plan


def test_hand_count():
    # Five layers: 0 dense, 1 and 3 select, 2 and 4 sparse.
    counters = build()
    record(counters, [1, 2], [1, 1], [30, 6])
    record(counters, [1, 2], [1, 1], [31, 7])
    assert counters.read() == {
        "decode_steps": 2,
        "tokens_attended": (3 * 30 + 2 * 10) + 5 * 6 + (3 * 31 + 2 * 10) + 5 * 7,
        "tokens_scored": 0,
        "tokens_dense": 5 * (30 + 6 + 31 + 7),
        "selections": 4,
        "requests": 2,
        "requests_dense": 1,
        "tokens_shared": 0,
        "rows_grouped": 0,
        "warm_starts": 0,
        "draft_tokens_attended": 0,
    }


def test_rows_that_keep_their_set_attend_to_it_in_selection_layers_too():
    counters = build()
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    actions = [KEEP, SELECT, RECALL, SELECT]
    counters.record(torch.tensor([1, 2, 3, 4]), plan_for([30, 40, 50, 6], actions=actions))
    totals = counters.read()
    assert totals["tokens_attended"] == (30 + 4 * 10) + (3 * 40 + 2 * 10) + (50 + 4 * 10) + 5 * 6
    assert (totals["selections"], totals["warm_starts"]) == (2, 1)


def test_rows_with_early_sets_attend_to_them_in_dense_layers_too():
    counters = build()
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    actions = [EARLY | KEEP, EARLY | SELECT, EARLY | SELECT | RECALL, SELECT]
    counters.record(torch.tensor([1, 2, 3, 4]), plan_for([30, 40, 50, 6], actions=actions))
    totals = counters.read()
    assert totals["tokens_attended"] == 5 * 10 + (2 * 40 + 3 * 10) + (2 * 50 + 3 * 10) + 5 * 6
    assert (totals["selections"], totals["warm_starts"]) == (4, 1)


def test_tokens_that_a_group_reads_once_are_counted_for_the_layers_that_do(monkeypatch):
    counters = build()
    slots = torch.arange(1, 33, dtype=torch.int32).repeat(3, 1)
    slots[2] += 100
    slots[1, 24:] += 200
    rows, lens = torch.tensor([1, 2, 3]), [30, 28, 30]
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    # One dense layer and two that select.
    counters.record(rows, plan_for(lens, slots=slots, granule=8))
    totals = counters.read()
    assert (totals["tokens_shared"], totals["rows_grouped"]) == (3 * 24, 2)
    # Rows that are scored one by one read nothing together.
    monkeypatch.setattr(reads, "SCORE_BYTES", 1)
    counters.record(rows, plan_for(lens, slots=slots, granule=8))
    assert counters.read()["tokens_shared"] == 3 * 24 + 1 * 24


def test_request_that_outgrows_the_budget_leaves_the_dense_ones():
    counters = build()
    record(counters, [3], [1], [10])
    assert counters.read()["requests_dense"] == 1
    record(counters, [3], [1], [11])
    assert counters.read()["requests"] == 1 and counters.read()["requests_dense"] == 0


def test_next_tenant_of_a_row_is_a_new_request():
    counters = build()
    record(counters, [3], [1], [20])
    record(counters, [3], [2], [5])
    assert counters.read()["requests"] == 2 and counters.read()["requests_dense"] == 1


def test_same_generation_after_a_flush_is_new_once_its_prefill_was_seen():
    counters = build()
    record(counters, [3], [1], [20])
    counters.forget(torch.tensor([3]))
    record(counters, [3], [1], [20])
    assert counters.read()["requests"] == 2


def test_padded_rows_count_for_nothing():
    counters = build()
    record(counters, [2, 0, 0], [1, 0, 0], [20, 1, 1])
    totals = counters.read()
    assert totals["requests"] == 1 and totals["tokens_dense"] == 5 * 20
    record(counters, [0], [0], [1])
    assert counters.read()["decode_steps"] == 1


def test_sets_of_pages_are_counted_as_full_as_they_are():
    # Layers 0 and 1 dense, 2 to 4 choose for themselves.
    method = build_method("quest", budget=32)
    counters = Counters(method.budget, method.layer_roles(5), num_rows=8, device=torch.device("cpu"))
    rows, lens = torch.tensor([1, 2, 0, 3]), torch.tensor([50, 20, 1, 48])
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    slots = torch.arange(4 * 64, dtype=torch.int32).view(4, 64)
    plan = plan_of(decode_of(method, heads=4), slots, lens)
    counters.record(rows, plan)
    # The last page of the first row has 2 tokens.
    held = torch.tensor([18, 20, 1, 32], dtype=torch.int32).unsqueeze(1).expand(-1, 2).contiguous()
    plan.chosen = Read(slots.unsqueeze(1).expand(-1, 2, -1), held)
    for layer in (2, 3, 4):
        counters.record_sets(layer, rows, plan)
    totals = counters.read()
    assert totals["tokens_attended"] == 2 * (50 + 20 + 48) + 3 * (18 + 20 + 32)
    assert (totals["tokens_dense"], totals["selections"]) == (5 * (50 + 20 + 48), 2 * 3)
    assert (totals["requests"], totals["requests_dense"]) == (3, 1)


def test_full_method_attends_to_everything():
    counters = build("full")
    record(counters, [1], [1], [30])
    totals = counters.read()
    assert totals["tokens_attended"] == totals["tokens_dense"] and totals["requests_dense"] == 1


def test_layers_that_score_by_keys_alone_attend_to_the_set():
    counters = build(keys_alone=True)
    record(counters, [1, 2, 3], [1, 1, 1], [30, 10, 11])
    totals = counters.read()
    # Layers 1 and 3 score, and only rows that exceed the budget.
    assert totals["tokens_scored"] == 2 * (30 + 11)
    assert totals["tokens_attended"] == (30 + 4 * 10) + 5 * 10 + (11 + 4 * 10)
    assert (totals["tokens_dense"], totals["selections"], totals["requests_dense"]) == (5 * 51, 4, 1)


def test_rows_that_keep_their_set_score_nothing():
    counters = build(keys_alone=True)
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    counters.record(torch.tensor([1, 2, 3]), plan_for([30, 40, 50], actions=[KEEP, SELECT, RECALL]))
    totals = counters.read()
    assert totals["tokens_scored"] == 2 * 40
    assert totals["tokens_attended"] == 30 + 40 + 50 + 3 * 4 * 10


def test_scored_tokens_of_a_group_count_as_shared():
    slots = torch.arange(1, 33, dtype=torch.int32).repeat(2, 1)
    slots[1, 24:] += 200
    shared = []
    for keys_alone in (False, True):
        counters = build(keys_alone=keys_alone)
        counters.learn_generations(torch.ones(8, dtype=torch.int64))
        counters.record(torch.tensor([1, 2]), plan_for([30, 28], slots=slots, granule=8))
        shared.append(counters.read()["tokens_shared"])
    assert shared == [3 * 24] * 2


def test_sets_shorter_than_the_budget_are_counted_in_the_layer_that_scored_for_them():
    attended = []
    for keys_alone in (False, True):
        counters, rows, plan = build(keys_alone=keys_alone), torch.tensor([1, 2]), plan_for([30, 6])
        counters.learn_generations(torch.ones(8, dtype=torch.int64))
        counters.record(rows, plan)
        plan.chosen = Read(torch.zeros(2, 10, dtype=torch.int32), torch.tensor([7, 6], dtype=torch.int32))
        for layer in (1, 3):
            counters.record_sets(layer, rows, plan)
        attended.append(counters.read()["tokens_attended"])
    assert attended == [3 * 30 + 2 * 7 + 5 * 6, 30 + 4 * 7 + 5 * 6]


def test_a_request_of_one_token_counts_for_nothing_with_overlap():
    # SGLang launches the step before it knows that the prefill's token was the last one.
    counters = build(overlap=True)
    record(counters, [3], [1], [30])
    counters.discard(torch.tensor([3]), [0])
    assert not any(counters.read().values())
    counters.settle()
    assert not any(counters.read().values())


def test_a_request_of_n_tokens_counts_n_minus_1_steps_whoever_decodes_beside_it():
    counters, seen = build(overlap=True), []
    # Rows 1 and 2 finish by a stop token: the step after their last is thrown away, and looked at after one more.
    steps = [
        ([1, 2, 4], []),
        ([1, 2, 4], []),
        ([1, 2, 4], []),
        ([2, 4], [(0, [1, 2, 4])]),
        ([4], [(0, [2, 4])]),
        ([4], []),
    ]
    for number, (rows, discarded) in enumerate(steps):
        record(counters, rows, [1] * len(rows), [20 + number] * len(rows))
        for place, batch in discarded:
            counters.discard(torch.tensor(batch), [place])
        seen.append(counters.read()["decode_steps"])
    counters.settle()
    totals = counters.read()
    lengths = [20, 21, 20, 21, 22, 20, 21, 22, 23, 24, 25]
    assert totals["tokens_dense"] == 5 * sum(lengths)
    assert totals["tokens_attended"] == sum(3 * n + 2 * 10 for n in lengths)
    assert (totals["selections"], totals["requests"], totals["decode_steps"]) == (2 * len(lengths), 3, 6)
    # The newest step is not known to be kept before the next one is launched.
    assert seen == [0, 1, 2, 3, 4, 5]


def test_what_sglang_tells_the_hooks_reaches_the_counters(monkeypatch):
    counters = build(overlap=True)
    monkeypatch.setattr(metrics._State, "lim", SimpleNamespace(counters=counters))
    record(counters, [3], [1], [20])
    record(counters, [3], [1], [21])
    metrics.on_discarded(torch.tensor([3]), [0])
    record(counters, [3], [2], [22])
    assert counters.read()["tokens_dense"] == 5 * 20
    metrics.on_idle()
    assert counters.read()["tokens_dense"] == 5 * (20 + 22)


def test_the_next_tenant_of_a_row_may_decode_when_the_last_one_s_step_is_taken_out():
    counters = build(overlap=True)
    record(counters, [3], [1], [20])
    record(counters, [3], [1], [21])
    counters.forget(torch.tensor([3]))
    counters.discard(torch.tensor([3]), [0])
    record(counters, [3], [2], [7])
    counters.settle()
    totals = counters.read()
    assert (totals["tokens_dense"], totals["requests"], totals["requests_dense"]) == (5 * (20 + 7), 2, 1)


def test_a_request_that_outgrew_the_budget_for_nothing_stays_dense():
    counters = build(overlap=True)
    record(counters, [3], [1], [10])
    record(counters, [3], [1], [11])
    counters.discard(torch.tensor([3]), [0])
    counters.settle()
    assert (counters.read()["requests_dense"], counters.read()["selections"]) == (1, 0)


def test_totals_never_go_down_whatever_is_thrown_away():
    """A schedule as SGLang's: the results of a step are looked at once the next one, if any, has been launched."""
    generator = random.Random(5)
    counters, left, tenants, queued, last = build(overlap=True), {}, [0] * 8, None, {}
    kept = 0
    for _ in range(300):
        if generator.random() < 0.5:
            row = generator.randrange(1, 8)
            if row not in left and row not in (queued or {}):
                left[row], tenants[row] = generator.randrange(0, 6), tenants[row] + 1
        launched = {row: tenants[row] for row in left} or None
        if launched:
            generations = torch.tensor(tenants)
            counters.learn_generations(generations)
            counters.record(torch.tensor(list(launched)), plan_for([20] * len(launched)))
        # The results of the step before, or a prefill's: requests without anything left have finished.
        thrown = [place for place, row in enumerate(queued or {}) if row not in left]
        if thrown:
            counters.discard(torch.tensor(list(queued)), thrown)
        kept += len(queued or {}) - len(thrown)
        for row in list(left):
            if row in (queued or {}) or left[row] == 0:
                left[row] -= 1
                if left[row] <= 0:
                    del left[row]
        if not launched and not queued:
            counters.settle()
        queued = launched
        totals = {name: total for name, total in counters.read().items() if name != "requests_dense"}
        assert all(totals[name] >= last.get(name, 0) for name in totals)
        last = totals
    assert 0 <= 20 * 5 * kept - last["tokens_dense"] <= 20 * 5 * 7, "only the newest step may be missing"
    assert kept > 100


def test_what_ran_before_the_counters_were_cleared_does_not_count():
    counters = build()
    record(counters, [1, 2], [1, 1], [30, 6])
    ledger = counters._ledger.totals
    counters.clear()
    assert not any(counters.read().values())
    assert counters._ledger.totals is ledger, "captured graphs write there"
    record(counters, [1], [1], [30])
    assert counters.read()["requests"] == 1


def test_nothing_is_published_of_what_runs_to_be_measured(monkeypatch):
    monkeypatch.setattr(metrics._State, "enabled", True)
    monkeypatch.setattr(metrics._State, "last", 0.0)
    monkeypatch.setattr(metrics._State, "dirty", False)
    monkeypatch.setattr(metrics._State, "pending", None)
    with metrics.unpublished():
        metrics.after_step(SimpleNamespace(counters=SimpleNamespace(totals=None)))
    assert metrics._State.enabled and not metrics._State.dirty and metrics._State.pending is None
