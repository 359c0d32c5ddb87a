"""Prefix selection by group: sets by the rule, attention over them in float64, and what rows share read once."""

from types import SimpleNamespace

import pytest
import torch

from lim_kernels import sparse_decode
from sgl_lim.methods import Role
from sgl_lim.serving.reads import Read
from support.driven_layers import (
    build_method,
    decode_of,
    int32,
    layer_of,
    plan_of,
    score_rows_at_once,
    whole_rows,
)
from support.fake_backend import batch_of, build
from support.group_oracle import check_group_sets, shared_of_long
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits

GRANULE, SLOTS, WIDTH, HEADS, SCALE = 4, 800, 92, 4, 0.3
RULE = SetRule("lessismore", 24, 0.25, 2, "union")
LENS = [90, 83, 70, 60, 12, 75, 88, 1]


def tree() -> torch.Tensor:
    """Rows 0 to 4 and 6 share 41 tokens, rows 0, 1 and 6 another 22, row 5 nothing; row 7 pads a captured graph.

    Row 4 is within the budget. Neither of the shared lengths is a multiple of the granule.
    """
    generator = torch.Generator().manual_seed(3)
    slots = (torch.randperm(SLOTS - 1, generator=generator) + 1)[: len(LENS) * WIDTH].view(len(LENS), WIDTH).int()
    for row in (1, 2, 3, 4, 6):
        slots[row, :41] = slots[0, :41]
    for row in (1, 6):
        slots[row, 41:63] = slots[0, 41:63]
    slots[7] = 0
    return slots


def build_rule(rule, aggregate="union", selection="group", attends="context"):
    """The method that follows a rule."""
    values = {"budget": rule.budget, "recency": rule.recency, "sinks": rule.sinks, "aggregate": aggregate}
    values |= {"selection_layers": (1,), "prefix_selection": selection, "selection_attends": attends}
    return build_method("lessismore", **values)


def run(aggregate="union", selection="group", rule=RULE, attends="context"):
    """A selection layer and a sparse layer over the tree."""
    decode = decode_of(build_rule(rule, aggregate, selection, attends), HEADS)
    plan = plan_of(decode, tree(), int32(LENS), GRANULE)
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(SLOTS, 2, 8, generator=generator) for _ in range(2))
    done = SimpleNamespace(plan=plan, decode=decode, k=k, v=v, q={}, out={})
    for role in (Role.SELECT, Role.SPARSE):
        done.q[role] = torch.randn(len(LENS), HEADS, 8, generator=generator)
        done.out[role] = decode.run(plan, role, layer_of(done.q[role], k, v, SCALE))
    return done


def sets_of(done):
    """Positions of each row's set."""
    sets = []
    for row, (length, chosen) in enumerate(zip(LENS, whole_rows(done.plan), strict=True)):
        position = {slot: t for t, slot in enumerate(done.plan.context.slots[row, :length].tolist())}
        sets.append([position[slot] for slot in chosen])
    return sets


@pytest.mark.parametrize("sizes", [(24, 0.25, 2), (24, 0.0, 0), (50, 0.5, 4)], ids=str)
@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
@pytest.mark.parametrize("attends", ["context", "set"])
def test_sets_are_the_rule_s_and_attention_is_over_them(attends, aggregate, sizes):
    rule = SetRule("lessismore", *sizes, aggregate)
    done = run(aggregate, rule=rule, attends=attends)
    sets, slots = sets_of(done), done.plan.context.slots.long()
    exact = [
        exact_logits(done.q[Role.SELECT][row], done.k[slots[row, :length]], SCALE) for row, length in enumerate(LENS)
    ]
    shared = shared_of_long(done.plan.context.slots, LENS, budget=rule.budget, granule=GRANULE)
    assert (shared[0][1], shared[0][2], shared[0][4], shared[0][5]) == (60, 40, 0, 0)
    check_group_sets(rule, sets, *(list(part) for part in zip(*exact, strict=True)), shared)
    for row, length in enumerate(LENS):
        selecting = sets[row] if attends == "set" else list(range(length))
        for role, positions in ((Role.SELECT, selecting), (Role.SPARSE, sets[row])):
            keys, values = (cache[slots[row, positions]] for cache in (done.k, done.v))
            check_attention(done.q[role][row], keys, values, SCALE, done.out[role][row], f"{role} of row {row}")
    assert sets != sets_of(run(aggregate, "request", rule=rule)), "each row for itself would pass as well"


def test_what_a_group_chose_is_read_once():
    done = run()
    plan = done.plan
    already_read = plan.shared.in_sets.already_read.tolist()
    # The first group's tokens and the second's; the neediest row of each is left its share.
    assert already_read[0] == already_read[4] == already_read[5] == already_read[7] == 0
    assert min(already_read[1], already_read[6]) > already_read[2] == already_read[3] > 0
    done.k[0], done.v[0] = float("nan"), float("nan")
    poisoned = plan.chosen.slots.clone()
    for row, n in enumerate(already_read):
        poisoned[row, :n] = 0
    poisoned[7] = 1
    plan.chosen = Read(poisoned, plan.chosen.ends, plan.chosen.groups)
    out = done.decode.run(plan, Role.SPARSE, layer_of(done.q[Role.SPARSE], done.k, done.v, SCALE))
    assert torch.equal(out[:7], done.out[Role.SPARSE][:7])


@pytest.mark.parametrize("attends", ["context", "set"])
@pytest.mark.parametrize("selection", ["group", "request"])
@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_rows_scored_in_parts_choose_the_same(selection, rows_at_once, attends, monkeypatch):
    whole = run(selection=selection, attends=attends)
    score_rows_at_once(monkeypatch, rows_at_once, heads=HEADS, width=WIDTH)
    parts = run(selection=selection, attends=attends)
    assert len(parts.plan.select) == -(-len(LENS) // rows_at_once)
    assert sets_of(whole) == sets_of(parts)
    for role in whole.out:
        torch.testing.assert_close(whole.out[role], parts.out[role])


def test_a_step_within_the_budget_is_dense():
    decode = decode_of(build_rule(SetRule("lessismore", 128, 0.25, 2, "union")), HEADS)
    plan = plan_of(decode, tree(), int32(LENS), GRANULE)
    assert plan.shared is None and plan.context.groups is not None


def test_a_replay_finds_the_groups_of_its_own_rows():
    table = tree()
    backend = build(table, prefix_selection="group")
    backend.init_cuda_graph_state(4, 4)
    found = []
    for rows in ([0, 0, 0, 0], [0, 1, 2, 0], [5, 4, 6, 1], [5, 4, 2, 0]):
        # Row 7 of the table is all padding, as row 0 of SGLang's is.
        view = batch_of([7 if n and not row else row for n, row in enumerate(rows)], [LENS[r] for r in rows])
        backend.init_forward_metadata_out_graph(view)
        backend.init_forward_metadata_in_graph(view)
        found.append([n > 0 for n in backend.lim.plan.shared.in_sets.own_starts.tolist()])
    assert found[1:] == [[True, True, True, False], [False, False, True, True], [False, False, False, False]]


def test_counters_know_what_sparse_layers_share():
    """Three layers, of which the first is dense and the second selects."""
    table = tree()
    totals = {}
    for selection in ("request", "group"):
        backend = build(table, prefix_selection=selection)
        backend.init_forward_metadata(batch_of([1, 2, 3, 5], [83, 70, 60, 75]))
        totals[selection] = backend.lim.counters.read()
        shared = backend.lim.plan.shared
    already_read, counts = shared.in_sets.already_read, shared.counts
    assert already_read[0] == already_read[3] == 0 and already_read[1] == already_read[2] > 0
    assert totals["group"]["tokens_shared"] == totals["request"]["tokens_shared"] + int(already_read.sum())
    dense = 2 * (83 + 70 + 60 + 75)
    assert totals["request"]["tokens_attended"] == dense + 4 * 16
    assert totals["group"]["tokens_attended"] == dense + int(counts.sum())


def test_sparse_layers_of_rows_that_share_nothing_are_as_before():
    alone = [row for row in range(len(LENS)) if row in (0, 5)]
    outs = []
    for selection in ("request", "group"):
        decode = decode_of(build_rule(RULE, selection=selection), HEADS)
        plan = plan_of(decode, tree()[alone], int32([90, 75]), GRANULE)
        generator = torch.Generator().manual_seed(5)
        q, k, v = (torch.randn(n, h, 8, generator=generator) for n, h in ((2, HEADS), (SLOTS, 2), (SLOTS, 2)))
        layer = layer_of(q, k, v, SCALE)
        decode.run(plan, Role.SELECT, layer)
        outs.append((plan.chosen.slots, plan.chosen.ends, decode.run(plan, Role.SPARSE, layer)))
    for ours, theirs in zip(*outs, strict=True):
        assert torch.equal(ours, theirs)
    exact = sparse_decode(q.double(), k.double(), v.double(), plan.chosen.slots, plan.chosen.ends, scale=SCALE)[0]
    torch.testing.assert_close(outs[1][2].double(), exact, rtol=1e-5, atol=1e-6)
