"""Sets per KV head: each head's set by the rule over its query heads, and attention of its query heads over it."""

import pytest
import torch

from sgl_lim.methods import Role
from sgl_lim.settings.config import configure
from support.driven_layers import build_method, decode_of, int32, layer_of, plan_of, score_rows_at_once
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits

SLOTS, WIDTH, HEADS, KV_HEADS, SCALE = 400, 92, 6, 3, 0.3
LENS = [90, 24, 60, 12, 25]


def rule_of(name, aggregate):
    """The rule by the sizes that the method keeps to, whatever it is given."""
    return SetRule(name, 24, *((0.25, 2) if name == "lessismore" else (0.0, 0)), aggregate, "kv_head")


def run(name, aggregate, width=WIDTH):
    """A selection layer and a sparse layer; q, k, v, outputs and the step's plan."""
    generator = torch.Generator().manual_seed(5)
    slots = (torch.randperm(SLOTS - 1, generator=generator) + 1)[: len(LENS) * 64].view(len(LENS), 64)
    slots = torch.cat([slots, slots], dim=1)[:, :width].int()
    slots[0] = (torch.randperm(SLOTS - 1, generator=generator) + 1)[:width]
    lens = int32(LENS).clamp(max=width)
    decode = decode_of(build(name, aggregate), HEADS)
    plan = plan_of(decode, slots, lens)
    k, v = (torch.randn(SLOTS, KV_HEADS, 8, generator=generator) for _ in range(2))
    qs = [torch.randn(len(LENS), HEADS, 8, generator=generator) for _ in range(2)]
    outs = [
        decode.run(plan, role, layer_of(q, k, v, SCALE)) for role, q in zip((Role.SELECT, Role.SPARSE), qs, strict=True)
    ]
    return qs, k, v, outs, plan


def build(name, aggregate):
    """A method with a set for each KV head, whatever its name."""
    values = {"budget": 24, "recency": 0.25, "sinks": 2, "aggregate": aggregate, "selection_layers": (1,)}
    return build_method(name, **values, scope="kv_head")


@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
@pytest.mark.parametrize("name", ["lessismore", "tidaldecode"])
def test_each_kv_head_has_the_rule_s_set_and_its_query_heads_attend_to_it(name, aggregate):
    rule = rule_of(name, aggregate)
    qs, k, v, outs, plan = run(name, aggregate)
    assert plan.chosen.slots.shape == (len(LENS), KV_HEADS, 24)
    different = 0
    for row, length in enumerate(LENS):
        slots = plan.context.slots[row, :length].long()
        position = {slot: t for t, slot in enumerate(slots.tolist())}
        exact, slack = exact_logits(qs[0][row], k[slots], SCALE)
        sets = []
        for head in range(KV_HEADS):
            held = plan.chosen.slots[row, head, : int(plan.chosen.ends[row, head])].tolist()
            sets.append([position[slot] for slot in held])
            queries = slice(2 * head, 2 * head + 2)
            assert rule.explains(sets[-1], exact[queries], length, slack[queries])
            check_attention(
                qs[1][row, queries],
                k[held, head : head + 1],
                v[held, head : head + 1],
                SCALE,
                outs[1][row, queries],
                f"row {row}, head {head}",
            )
        check_attention(qs[0][row], k[slots], v[slots], SCALE, outs[0][row], f"row {row}")
        different += len({tuple(held) for held in sets}) > 1
    assert different == 3, "one set for all heads would pass as well"


def test_tidaldecode_keeps_neither_sinks_nor_window():
    sizes = build("tidaldecode", "max").sizes
    assert (sizes.middle, sizes.sinks, sizes.recent) == (24, 0, 0)
    *_, plan = run("tidaldecode", "max")
    last = plan.context.slots[0, LENS[0] - 1]
    assert not bool((plan.chosen.slots[0] == last).any(dim=1).all()), "the current token is no token of its own rule"


def test_rows_scored_in_parts_choose_the_same(monkeypatch):
    whole = run("lessismore", "union")
    score_rows_at_once(monkeypatch, 2, heads=HEADS, width=WIDTH)
    parts = run("lessismore", "union")
    assert (len(whole[4].select), len(parts[4].select)) == (1, 3)
    assert torch.equal(whole[4].chosen.slots, parts[4].chosen.slots)
    assert torch.equal(whole[4].chosen.ends, parts[4].chosen.ends)
    for ours, theirs in zip(whole[3], parts[3], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_within_the_budget_has_one_set():
    *_, plan = run("lessismore", "union", width=24)
    assert plan.chosen.slots is plan.context.slots and plan.chosen.ends is plan.seq_lens


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scope": "head"}, "--lim-scope must be one of global, kv_head"),
        (
            {"method": "tidaldecode", "scope": "global"},
            "--lim-scope must be kv_head, got 'global' (--lim-method tidaldecode)",
        ),
        ({"method": "window", "scope": "kv_head"}, "--lim-method window has one set for all heads"),
        ({"scope": "kv_head", "prefix_selection": "group"}, "--lim-prefix-selection group takes one set a request"),
        ({"scope": "kv_head", "selection_interval": 4}, "--lim-selection-interval 4 takes one set a request"),
        ({"scope": "kv_head", "early_sets": True}, "--lim-early-sets on takes one set a request"),
        ({"method": "tidaldecode", "selection_interval": 4}, "--lim-selection-interval 4: --lim-method tidaldecode"),
    ],
)
def test_what_cannot_work_is_refused(values, said):
    (problem,) = configure(**values).problems()
    assert said in problem and ("leave" in problem or "must be" in problem)


def test_scopes_that_work():
    for values in ({"scope": "kv_head"}, {"method": "tidaldecode"}, {"method": "tidaldecode", "scope": "kv_head"}):
        assert configure(**values).problems() == []
