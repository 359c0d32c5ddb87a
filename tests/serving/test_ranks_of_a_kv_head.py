"""More tensor-parallel ranks than KV heads: ranks that hold the same one choose the set of all its query heads."""

import pytest
import torch
from sglang.srt.distributed import parallel_state

from lim_kernels import bound_pages
from lim_kernels.page_bounds import PAGE, PageBounds
from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.serving.state import combiner, share_of_heads
from support.driven_layers import build_method, int32, layer_of, plan_of
from support.ranks import Ranks

HEADS, KV_HEADS, DIM, SLOTS, BUDGET, SCALE = 8, 2, 8, 1024, 48, 0.4
LENS = [200, 48, 131, 7]
CASES = [("lessismore", aggregate) for aggregate in ("union", "max", "sum")] + [("tidaldecode", "union"), ("quest", "")]


def operands():
    """Slots of rows of whole pages, queries of a choosing and a sparse layer, keys and values."""
    generator = torch.Generator().manual_seed(15)
    pages = (torch.randperm(SLOTS // PAGE - 1, generator=generator) + 1)[: len(LENS) * 13].view(len(LENS), 13)
    slots = (pages.unsqueeze(2) * PAGE + torch.arange(PAGE)).flatten(1)[:, :200].int()
    qs = [torch.randn(len(LENS), HEADS, DIM, generator=generator) for _ in range(2)]
    k, v = (torch.randn(SLOTS, KV_HEADS, DIM, generator=generator) for _ in range(2))
    return slots, qs, k, v


def learnt(keys):
    """Bounds of all pages of the keys."""
    bounds = PageBounds(*(torch.zeros(SLOTS // PAGE, *keys.shape[1:]) for _ in range(2)))
    bound_pages(bounds, keys, torch.arange(SLOTS, dtype=torch.int32))
    return bounds


def run(name, aggregate, heads, combine):
    """The set that a rank puts in force, and what its query heads read by it; the rank has the KV heads for them."""
    values = {"budget": BUDGET, "recency": 0.25, "sinks": 2, "aggregate": aggregate or "max", "selection_layers": (1,)}
    decode = LayerDecode(build_method(name, **values, scope="kv_head"), heads, combine)
    slots, qs, k, v = operands()
    group, last = HEADS // KV_HEADS, heads.first + heads.own
    held = slice(heads.first // group, -(-last // group))
    k, v = k[:, held].contiguous(), v[:, held].contiguous()
    plan = plan_of(decode, slots, int32(LENS))
    chooses = Role.OWN if name == "quest" else Role.SELECT
    bounds = learnt(k) if chooses is Role.OWN else None
    outs = [
        decode.run(plan, role, layer_of(q[:, heads.first : last].contiguous(), k, v, SCALE, bounds))
        for role, q in zip((chooses, Role.SPARSE), qs, strict=True)
    ]
    return plan.chosen, outs


def run_ranks(name, aggregate, number, monkeypatch):
    """`run` on each rank of a group, each with the heads that SGLang gives it."""
    ranks = Ranks(number)
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: ranks)

    def work():
        heads = share_of_heads(HEADS, KV_HEADS)
        return heads, *run(name, aggregate, heads, combiner(heads, per_kv_head=True))

    return ranks.run(work)


@pytest.mark.parametrize("number", [2, 4, 8])
@pytest.mark.parametrize(("name", "aggregate"), CASES)
def test_ranks_choose_the_set_of_all_query_heads_of_their_kv_head(name, aggregate, number, monkeypatch):
    chosen, outs = run(name, aggregate, HeadsOfRank(0, HEADS, HEADS), None)
    for rank, (heads, its, its_outs) in enumerate(run_ranks(name, aggregate, number, monkeypatch)):
        kv_head = rank * KV_HEADS // number
        for row, length in enumerate(LENS):
            count = int(chosen.ends[row, kv_head])
            assert int(its.ends[row, 0]) == count == min(length, count)
            assert its.slots[row, 0, :count].tolist() == chosen.slots[row, kv_head, :count].tolist()
        for out, own in zip(outs, its_outs, strict=True):
            torch.testing.assert_close(own, out[:, heads.first : heads.first + heads.own])


@pytest.mark.parametrize(("name", "aggregate"), CASES)
def test_a_part_of_the_query_heads_would_choose_otherwise(name, aggregate, monkeypatch):
    """The test above could fail: ranks that did not combine their scores would have other sets."""
    chosen, _ = run(name, aggregate, HeadsOfRank(0, HEADS, HEADS), None)
    parts = [run(name, aggregate, HeadsOfRank(first, 2, HEADS), None)[0] for first in (0, 2)]
    long = [row for row, length in enumerate(LENS) if length > BUDGET]
    assert any(sorted(one.slots[row, 0]) != sorted(chosen.slots[row, 0]) for one in parts for row in long)


@pytest.mark.parametrize(
    ("number", "per_kv_head", "combined"), [(1, False, 0), (1, True, 0), (2, True, 0), (2, False, 2)]
)
def test_ranks_combine_only_what_they_choose_together(number, per_kv_head, combined, monkeypatch):
    ranks = Ranks(number)
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: ranks)
    found = ranks.run(lambda: combiner(share_of_heads(HEADS, KV_HEADS), per_kv_head=per_kv_head))
    assert len([one for one in found if one is not None]) == combined
