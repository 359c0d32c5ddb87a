"""Adaptive budgets and windows in a step's layers: sets, attention over them, accounts, and what is refused."""

import argparse
import itertools

import pytest
import torch

from sgl_lim.methods import Role
from sgl_lim.serving.counters import Counters
from sgl_lim.settings import flags as flags_module
from sgl_lim.settings.config import ENV, configure
from support.adaptive_oracle import explains_adaptive
from support.driven_layers import build_method, decode_of, int32, layer_of, plan_of
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits

SLOTS, HEADS, KV_HEADS, BUDGET, SCALE = 900, 6, 3, 64, 0.5
LENS = [300, 64, 150, 20, 65]
# Layers: one dense, a selection with two readers, and one with a single reader.
ROLES = (Role.DENSE, Role.SELECT, Role.SPARSE, Role.SPARSE, Role.SELECT, Role.SPARSE)


def build(**fields):
    fields = {"recency": 0.25, "sinks": 2, "aggregate": "sum"} | fields
    return build_method("lessismore", budget=BUDGET, selection_layers=(1, 4), **fields)


def run(method):
    """All layers of a step; what each got and gave, and the step's plan after it."""
    generator = torch.Generator().manual_seed(11)
    slots = torch.stack([torch.randperm(SLOTS - 1, generator=generator)[:300] + 1 for _ in LENS]).int()
    decode = decode_of(method, HEADS)
    plan = plan_of(decode, slots, int32(LENS))
    for role in ROLES:
        q = torch.randn(len(LENS), HEADS, 16, generator=generator) * 2
        k, v = (torch.randn(SLOTS, KV_HEADS, 16, generator=generator) for _ in range(2))
        out = decode.run(plan, role, layer_of(q, k, v, SCALE))
        yield role, q, k, v, out, plan


def positions_of(plan, row):
    """The positions in each of a row's sets: one for all heads, or one a KV head."""
    position = {slot: t for t, slot in enumerate(plan.context.slots[row, : LENS[row]].tolist())}
    slots, counts = plan.chosen.slots[row], plan.chosen.ends[row]
    slots, counts = (slots, counts) if slots.dim() == 2 else (slots[None], counts[None])
    return [[position[s] for s in held[: int(n)].tolist()] for held, n in zip(slots, counts, strict=True)]


@pytest.mark.parametrize(("scope", "attends"), [("global", "context"), ("global", "set"), ("kv_head", "set")])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5},
        {"top_p": 0.9, "top_p_floor": 24, "aggregate": "max"},
        {"recency": "auto"},
        {"top_p": 0.6, "recency": "auto"},
    ],
    ids=["top-p", "floor", "auto", "both"],
)
def test_sets_hold_what_they_are_to_hold_and_are_attended_to(fields, scope, attends):
    method = build(**fields, scope=scope, selection_attends=attends)
    sizes = {"budget": BUDGET, "sinks": 2, "top_p": method.top_p, "floor": method.floor if method.sizes_vary else 1}
    sizes["recent"] = None if method.window_varies else method.sizes.recent
    seen = set()
    for role, q, k, v, out, plan in run(method):
        for row, length in enumerate(LENS):
            context = plan.context.slots[row, :length].long()
            attended = [list(range(length))]
            if role is not Role.DENSE:
                sets = positions_of(plan, row)
                assert len(sets) == (KV_HEADS if scope == "kv_head" else 1)
                attended = sets if role is Role.SPARSE or attends == "set" else attended
            if role is Role.SELECT:
                exact, slack = exact_logits(q[row], k[context], SCALE)
                for head, (logits, chosen) in enumerate(zip(exact.chunk(len(sets)), sets, strict=True)):
                    scores = SetRule("lessismore", BUDGET, 0.25, 2, method.aggregate).scores(logits.double())
                    error = float(torch.expm1(4 * slack.max())) + 1e-5
                    right = chosen == list(range(length)) if length <= BUDGET else None
                    assert right or explains_adaptive(chosen, scores, error=error, **sizes), (row, head)
                    seen.add(len(chosen))
            for queries, keys, values, outs, held in zip(
                *(x.chunk(len(attended)) for x in (q[row], k.transpose(0, 1), v.transpose(0, 1), out[row])),
                attended,
                strict=True,
            ):
                slots = context[held]
                check_attention(
                    queries, keys[:, slots].transpose(0, 1), values[:, slots].transpose(0, 1), SCALE, outs, f"row {row}"
                )
    assert len(seen) > 3 or method.top_p is None, "sets of one size would pass as well"


@pytest.mark.parametrize("scope", ["global", "kv_head"])
def test_tokens_attended_are_those_of_the_sets(scope):
    method = build(top_p=0.5, scope=scope)
    counters = Counters(method.budget, ROLES, num_rows=8, device=torch.device("cpu"))
    assert method.layer_roles(len(ROLES)) == ROLES
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    # The third row only pads.
    rows, lens = torch.tensor([3, 1, 0, 2, 5]), torch.tensor(LENS, dtype=torch.int32)
    counters.record(rows, plan_of(decode_of(method, HEADS), torch.ones(5, 300, dtype=torch.int32), lens))
    expected, last = 3 * sum(n for n, row in zip(LENS, rows.tolist(), strict=True) if row), 0.0
    for layer, (role, *_, plan) in enumerate(run(method)):
        if role is Role.SELECT:
            counters.record_sets(layer, rows, plan)
            last = float((plan.chosen.ends.double().view(5, -1).mean(1) * (rows != 0)).sum())
        expected += last * (role is Role.SPARSE)
    attended = counters.read()["tokens_attended"]
    # A fraction of a token is rounded down in each row and selection.
    assert expected - 8 < attended <= expected + 1e-6
    assert attended < 3 * 549 + 3 * (2 * 64 + 20 + 64) and counters.read()["selections"] == 2 * 2


def parse(monkeypatch, *flags):
    monkeypatch.setenv(ENV, "")
    parser = argparse.ArgumentParser()
    flags_module.add_flags(parser)
    flags_module.take_flags(parser.parse_args(flags))
    return flags_module.load()


def test_flags_arrive(monkeypatch):
    flags = ("--lim-top-p", "0.9", "--lim-top-p-floor", "99", "--lim-recency", "auto", "--lim-aggregate", "sum")
    got = parse(monkeypatch, *flags)
    assert got == configure(top_p=0.9, top_p_floor=99, recency="auto", aggregate="sum")
    assert got.problems() == []
    method = got.build()
    assert (method.window_varies, method.sizes.recent, method.top_p, method.floor) == (True, 1020, 0.9, 99)
    assert build_method("lessismore", budget=512, top_p=0.5).floor == 64


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_p": 1.0}, "--lim-top-p must lie between 0 and 1"),
        ({"top_p": "most"}, "--lim-top-p must lie between 0 and 1"),
        ({"top_p": 0.9, "aggregate": "union"}, "take sum or max"),
        ({"recency": "auto", "aggregate": "union"}, "take sum or max"),
        ({"top_p": 0.9, "prefix_selection": "group"}, "--lim-prefix-selection group"),
        ({"recency": "auto", "selection_interval": 4}, "--lim-selection-interval 4"),
        ({"top_p": 0.9, "early_sets": True}, "--lim-early-sets on"),
        ({"top_p": 0.9, "method": "window"}, "--lim-method window weighs no tokens"),
        ({"recency": "auto", "method": "full"}, "--lim-method full weighs no tokens"),
        ({"recency": "auto", "method": "tidaldecode"}, "--lim-method tidaldecode weighs no tokens for a window"),
        ({"top_p_floor": 4}, "does nothing without --lim-top-p"),
        ({"top_p": 0.9, "top_p_floor": 0}, "--lim-top-p-floor must be a positive integer"),
        ({"top_p": 0.9, "top_p_floor": 3000}, "exceeds --lim-budget 2048"),
        ({"recency": "half"}, "must be between 0 and 1, or auto"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(values, reason):
    problems = configure(**{"aggregate": "max", **values}).problems()
    assert len(problems) == 1 and problems[0].startswith("--lim-") and reason in problems[0]


def test_sets_per_kv_head_may_be_adaptive():
    for scope, method in itertools.product(("kv_head",), ("lessismore", "tidaldecode")):
        assert configure(method=method, scope=scope, top_p=0.9, aggregate="max").problems() == []
