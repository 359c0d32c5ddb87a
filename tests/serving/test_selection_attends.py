"""Selection layers that attend to the set that they choose: what they never read, and that ranks and flags agree."""

from dataclasses import replace

import pytest
import torch

from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.serving import layer as layer_module
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.settings.config import configure
from support.driven_layers import build_method, decode_of, int32, layer_of, plan_of, whole_rows
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits

SLOTS, WIDTH, HEADS, KV_HEADS, SCALE = 600, 92, 6, 3, 0.3
LENS, SHARED, GRANULE = [90, 24, 61, 12, 25, 92], 40, 4
RULE = SetRule("lessismore", 24, 0.25, 2, "max", attends="set")


def operands():
    """Slots of rows, the first, third and last of which share a prefix; a layer's queries, keys and values."""
    generator = torch.Generator().manual_seed(6)
    slots = (torch.randperm(SLOTS - 1, generator=generator) + 1)[: len(LENS) * WIDTH].view(len(LENS), WIDTH).int()
    slots[2, :SHARED] = slots[5, :SHARED] = slots[0, :SHARED]
    q = torch.randn(len(LENS), HEADS, 8, generator=generator)
    return slots, q, *(torch.randn(SLOTS, KV_HEADS, 8, generator=generator) for _ in range(2))


def build(name="lessismore", **values):
    fields = {"budget": 24, "recency": 0.25, "sinks": 2, "aggregate": "max", "selection_layers": (1,)}
    return build_method(name, **fields | {"selection_attends": "set"} | values)


def select(method, q, k, v, slots, granule=None):
    """A selection layer of one step: its output, and the step's plan."""
    decode = decode_of(method, HEADS)
    plan = plan_of(decode, slots, int32(LENS), granule)
    return decode.run(plan, Role.SELECT, layer_of(q, k, v, SCALE)), plan


def outside(plan):
    """bool [SLOTS, H_kv]: values that are in no row's set."""
    sets, counts = plan.chosen.slots, plan.chosen.ends
    if sets.dim() == 2:
        sets, counts = sets[:, None].expand(-1, KV_HEADS, -1), counts[:, None].expand(-1, KV_HEADS)
    found = torch.ones(SLOTS, KV_HEADS, dtype=torch.bool)
    for row in range(len(LENS)):
        for head in range(KV_HEADS):
            found[sets[row, head, : int(counts[row, head])].long(), head] = False
    return found


@pytest.mark.parametrize("granule", [None, GRANULE], ids=["alone", "prefix-groups"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lessismore", {}),
        ("lessismore", {"scope": "kv_head"}),
        ("lessismore", {"top_p": 0.5}),
        ("lessismore", {"prefix_selection": "group"}),
        ("tidaldecode", {"aggregate": "union"}),
    ],
    ids=["global", "kv-head", "top-p", "group", "tidaldecode"],
)
def test_values_outside_the_set_are_never_read(name, values, granule):
    slots, q, k, v = operands()
    method = build(name, **values)
    out, plan = select(method, q, k, v, slots, granule)
    unread = outside(plan)
    assert int(unread.sum()) > SLOTS
    poisoned = v.masked_fill(unread.unsqueeze(2), float("nan"))
    again, _ = select(method, q, k, poisoned, slots, granule)
    assert torch.equal(out, again)
    everything, _ = select(replace(method, selection_attends="context"), q, k, poisoned, slots, granule)
    assert everything.isnan().any(), "a layer that reads the context would pass as well"


def test_a_row_within_the_budget_attends_to_all_it_has():
    slots, q, k, v = operands()
    out, plan = select(build(), q, k, v, slots)
    for row in (row for row, length in enumerate(LENS) if length <= RULE.budget):
        context = slots[row, : LENS[row]].long()
        assert whole_rows(plan)[row] == context.tolist()
        check_attention(q[row], k[context], v[context], SCALE, out[row], f"row {row}")


def test_keys_of_the_context_are_read_once(monkeypatch):
    """One operator scores, one attends to the set; nothing attends to the context."""
    calls = []
    for name in ("score_context", "sparse_decode", "grouped_decode", "decode_with_scores"):
        operator = getattr(layer_module, name)

        def counted(*given, name=name, operator=operator, **options):
            calls.append((name, given[-2 if name == "score_context" else 3].shape))
            return operator(*given, **options)

        monkeypatch.setattr(layer_module, name, counted)
    slots, q, k, v = operands()
    select(build(), q, k, v, slots, GRANULE)
    assert [name for name, _ in calls] == ["score_context", "sparse_decode"]
    assert calls[1][1] == (len(LENS), RULE.budget)


@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
def test_ranks_choose_one_set_and_attend_to_it(aggregate):
    slots, q, k, v = operands()
    method, rule = build(aggregate=aggregate), replace(RULE, aggregate=aggregate)
    heads_of, kv_of = [slice(0, 4), slice(4, 6)], [slice(0, 2), slice(2, 3)]
    # The first time a rank's scores are only collected; then all ranks get them combined.
    collected, runs = [], []
    for combine in (lambda scores, how: collected.append(scores) or scores, lambda scores, how: reduce(collected, how)):
        runs = []
        for heads, kv in zip(heads_of, kv_of, strict=True):
            decode = LayerDecode(method, HeadsOfRank(heads.start, heads.stop - heads.start, HEADS), combine)
            plan = plan_of(decode, slots, int32(LENS))
            layer = layer_of(q[:, heads], k[:, kv].contiguous(), v[:, kv].contiguous(), SCALE)
            runs.append((decode.run(plan, Role.SELECT, layer), whole_rows(plan)))
    assert runs[0][1] == runs[1][1]
    for row, length in enumerate(LENS):
        context = slots[row, :length].long()
        exact, slack = exact_logits(q[row], k[context], SCALE)
        position = {slot: t for t, slot in enumerate(context.tolist())}
        chosen = [position[slot] for slot in runs[0][1][row]]
        assert rule.explains(chosen, exact, length, slack)
        held = context[chosen]
        for (out, _), heads, kv in zip(runs, heads_of, kv_of, strict=True):
            check_attention(q[row, heads], k[held][:, kv], v[held][:, kv], SCALE, out[row], f"row {row}")


def reduce(scores, how):
    """The scores of all ranks, as a tensor-parallel group combines them."""
    stacked = torch.stack(scores)
    return stacked.amax(0) if how == "max" else stacked.logsumexp(0)


def test_the_flag_is_refused_where_it_says_nothing():
    for method in ("window", "quest", "full"):
        budget = {} if method == "full" else {"budget": 64}
        (problem,) = configure(method=method, selection_attends="set", **budget).problems()
        assert problem == (
            f"--lim-selection-attends set: --lim-method {method} has no selection layers; leave the flag out"
        )
    (problem,) = configure(selection_attends="all").problems()
    assert problem == "--lim-selection-attends must be one of context, set, got 'all'"


@pytest.mark.parametrize(
    "values",
    [
        {"scope": "kv_head"},
        {"method": "tidaldecode"},
        {"prefix_selection": "group"},
        {"selection_interval": 4},
        {"early_sets": True, "selection_layers": (2, 12)},
        {"top_p": 0.5, "recency": "auto", "aggregate": "max"},
    ],
    ids=str,
)
def test_it_goes_with_every_other_parameter(values):
    config = configure(selection_attends="set", **values)
    assert config.problems() == [] and config.build().settings()["selection_attends"] == "set"


def test_by_default_selection_layers_attend_to_the_context():
    assert configure().build().selection_attends == "context"
