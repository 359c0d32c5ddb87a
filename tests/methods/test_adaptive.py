"""Adaptive budgets and windows in a step's layers: sets, attention over them, accounts, and what is refused."""

import argparse
import itertools

import pytest
import torch

from sgl_lim.methods import METHODS, Role
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.decode import HeadShare, Scales, attend, begin_step
from sgl_lim.settings import config
from sgl_lim.settings.adaptive import parameters
from sgl_lim.settings.config import LimConfig
from support.adaptive_oracle import explains_adaptive
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits

SLOTS, HEADS, KV_HEADS, BUDGET, SCALE = 900, 6, 3, 64, 0.5
LENS = [300, 64, 150, 20, 65]
# Layers: one dense, a selection with two readers, and one with a single reader.
ROLES = (Role.DENSE, Role.SELECT, Role.SPARSE, Role.SPARSE, Role.SELECT, Role.SPARSE)


def build(**fields):
    fields = {"recency": 0.25, "sinks": 2, "aggregate": "sum"} | fields
    return METHODS["lessismore"](budget=BUDGET, selection_layers=(1, 4), **fields)


def run(method):
    """All layers of a step; what each got and gave, and the step's set after it."""
    generator = torch.Generator().manual_seed(11)
    slots = torch.stack([torch.randperm(SLOTS - 1, generator=generator)[:300] + 1 for _ in LENS]).int()
    lens = torch.tensor(LENS, dtype=torch.int32)
    step = begin_step(method, slots, lens, None)
    heads = HeadShare(0, HEADS, HEADS, None)
    for role in ROLES:
        q = torch.randn(len(LENS), HEADS, 16, generator=generator) * 2
        k, v = (torch.randn(SLOTS, KV_HEADS, 16, generator=generator) for _ in range(2))
        out = attend(method, step, role, q, k, v, scales=Scales(SCALE, 0.0), heads=heads)
        yield role, q, k, v, out, step


def positions_of(step, row):
    """The positions in each of a row's sets: one for all heads, or one a KV head."""
    position = {slot: t for t, slot in enumerate(step.slots[row, : LENS[row]].tolist())}
    slots, counts = step.set_slots[row], step.set_counts[row]
    slots, counts = (slots, counts) if slots.dim() == 2 else (slots[None], counts[None])
    return [[position[s] for s in held[: int(n)].tolist()] for held, n in zip(slots, counts, strict=True)]


@pytest.mark.parametrize("scope", ["global", "kv_head"])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5},
        {"top_p": 0.9, "top_p_floor": 24, "aggregate": "max"},
        {"recency": 0.5, "auto_recency": True},
        {"top_p": 0.6, "recency": 0.5, "auto_recency": True},
    ],
    ids=["top-p", "floor", "auto", "both"],
)
def test_sets_hold_what_they_are_to_hold_and_are_attended_to(fields, scope):
    method = build(**fields, scope=scope)
    sizes = {"budget": BUDGET, "sinks": 2, "top_p": method.top_p, "floor": method.top_p_floor}
    sizes["recent"] = None if method.auto_recency else method.recent
    seen = set()
    for role, q, k, v, out, step in run(method):
        for row, length in enumerate(LENS):
            context = step.slots[row, :length].long()
            attended = [list(range(length))]
            if role is not Role.DENSE:
                sets = positions_of(step, row)
                assert len(sets) == (KV_HEADS if scope == "kv_head" else 1)
                attended = sets if role is Role.SPARSE else attended
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
    counters = Counters(method, num_layers=len(ROLES), num_rows=8, device=torch.device("cpu"))
    assert method.layer_roles(len(ROLES)) == ROLES
    counters.learn_generations(torch.ones(8, dtype=torch.int64))
    # The third row only pads.
    rows, lens = torch.tensor([3, 1, 0, 2, 5]), torch.tensor(LENS, dtype=torch.int32)
    counters.record(rows, lens)
    expected, last = 3 * sum(n for n, row in zip(LENS, rows.tolist(), strict=True) if row), 0.0
    for layer, (role, *_, step) in enumerate(run(method)):
        if role is Role.SELECT:
            counters.record_sets(layer, rows, step.seq_lens, step.set_counts)
            last = float((step.set_counts.double().view(5, -1).mean(1) * (rows != 0)).sum())
        expected += last * (role is Role.SPARSE)
    attended = counters.read()["tokens_attended"]
    assert expected - 2 < attended <= expected + 1e-6
    assert attended < 3 * 549 + 3 * (2 * 64 + 20 + 64) and counters.read()["selections"] == 2 * 2


def parse(monkeypatch, *flags):
    monkeypatch.setenv(config.ENV, "")
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    config.take_flags(parser.parse_args(flags))
    return config.load()


def test_flags_arrive(monkeypatch):
    flags = ("--lim-top-p", "0.9", "--lim-top-p-floor", "99", "--lim-recency", "auto", "--lim-aggregate", "sum")
    got = parse(monkeypatch, *flags)
    assert got == LimConfig(top_p=0.9, top_p_floor=99, recency="auto", aggregate="sum")
    assert got.problems() == []
    assert parameters(got) == {"recency": 0.5, "auto_recency": True, "top_p": 0.9, "top_p_floor": 99}
    assert parameters(LimConfig(budget=512, recency=0.1))["top_p_floor"] == 64


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
        ({"recency": "auto", "method": "tidaldecode"}, "--lim-method tidaldecode keeps no window"),
        ({"top_p_floor": 4}, "does nothing without --lim-top-p"),
        ({"top_p": 0.9, "top_p_floor": 0}, "--lim-top-p-floor must be a positive integer"),
        ({"top_p": 0.9, "top_p_floor": 3000}, "exceeds --lim-budget 2048"),
        ({"recency": "half"}, "must be between 0 and 1, or auto"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(values, reason):
    problems = LimConfig(**{"aggregate": "max", **values}).problems()
    assert len(problems) == 1 and problems[0].startswith("--lim-") and reason in problems[0]


def test_sets_per_kv_head_may_be_adaptive():
    for scope, method in itertools.product(("kv_head",), ("lessismore", "tidaldecode")):
        assert LimConfig(method=method, scope=scope, top_p=0.9, aggregate="max").problems() == []
