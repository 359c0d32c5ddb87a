"""Tensor-parallel ranks verify with a part of the heads each, and leave one set for the drafts of all."""

import pytest
import torch
from sglang.srt.distributed import parallel_state

from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.serving.draft_sets import Drafts, DraftSets
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.serving.state import combiner, share_of_heads
from sgl_lim.serving.verification import VerifyPlan, guide_drafts, plan_guide
from support.driven_layers import build_method, int32, layer_of
from support.ranks import Ranks

HEADS, KV_HEADS, DIM, SLOTS, WIDTH, BUDGET, TOKENS = 8, 4, 8, 1024, 200, 48, 3
LENS = [197, 40, 131]
ROWS = torch.tensor([2, 4, 1])
CASES = [("request", "union"), ("request", "sum"), ("request", "max"), ("kv_head", "sum"), ("group", "sum")]


def operands():
    """KV slots of three rows, two of which share a prefix, queries of all tokens, keys and values."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.stack([torch.randperm(SLOTS - 1, generator=generator)[:WIDTH] + 1 for _ in LENS]).int()
    slots[2, :96] = slots[0, :96]
    q = torch.randn(len(LENS) * TOKENS, HEADS, DIM, generator=generator)
    k, v = (torch.randn(SLOTS, KV_HEADS, DIM, generator=generator) for _ in range(2))
    return slots, q, k, v


def method_of(choose_for, aggregate):
    values = {"prefix_selection": "group"} if choose_for == "group" else {}
    values["scope"] = "kv_head" if choose_for == "kv_head" else "request"
    return build_method(
        "lessismore", budget=BUDGET, recency=0.25, sinks=2, aggregate=aggregate, selection_layers=(1,), **values
    )


def left_by(heads, combine, choose_for, aggregate):
    """Positions int32 [rows, H_kv or 1, K] and their numbers, which a verification with these heads leaves."""
    slots, q, k, v = operands()
    share, end = HEADS // KV_HEADS, heads.first + heads.own
    held = slice(heads.first // share, -(-end // share))
    layer = layer_of(q[:, heads.first : end], k[:, held].contiguous(), v[:, held].contiguous(), 0.4)
    method = method_of(choose_for, aggregate)
    decode, roles = LayerDecode(method, heads, combine), (Role.DENSE, Role.SELECT, Role.SPARSE)
    sets = DraftSets(method, roles, TOKENS, num_rows=6, kv_heads=held.stop - held.start, device="cpu")
    plan = VerifyPlan(TOKENS, None, plan_guide(decode, slots, int32([length + 1 for length in LENS]), 32))
    guide_drafts(decode, Drafts(TOKENS, sets, torch.zeros(6)), plan, ROWS, 1, layer)
    return sets.memory.sets[0][ROWS], sets.memory.counts[0][ROWS]


def as_sets(left):
    """A set of positions for each row and KV head."""
    return [[set(one[:n].tolist()) for one, n in zip(*each, strict=True)] for each in zip(*left, strict=True)]


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(("choose_for", "aggregate"), CASES)
def test_ranks_leave_the_sets_of_all_heads(choose_for, aggregate, number, monkeypatch):
    per_kv_head = choose_for == "kv_head"
    whole = as_sets(left_by(HeadsOfRank(0, HEADS, HEADS), None, choose_for, aggregate))
    ranks = Ranks(number)
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: ranks)

    def work():
        heads = share_of_heads(HEADS, KV_HEADS)
        return as_sets(left_by(heads, combiner(heads, per_kv_head=per_kv_head), choose_for, aggregate))

    found = ranks.run(work)
    for row, expected in enumerate(whole):
        if per_kv_head:
            assert [one for rank in found for one in rank[row]] == expected
        else:
            assert all(rank[row] == expected for rank in found)


@pytest.mark.parametrize("aggregate", ["union", "sum", "max"])
def test_a_rank_by_itself_would_leave_others(aggregate):
    """The test above could fail."""
    whole = as_sets(left_by(HeadsOfRank(0, HEADS, HEADS), None, "request", aggregate))
    assert as_sets(left_by(HeadsOfRank(0, HEADS // 2, HEADS), None, "request", aggregate)) != whole
