"""The recorder's sums over the torch operators against float64 arithmetic and sets from the brute-force oracle."""

import threading

import pytest
import torch

from lim_kernels import Scaling, decode_with_scores
from sgl_lim.methods import Full, HeadsOfRank
from sgl_lim.serving import recorder as under_test
from sgl_lim.serving.layer import LayerInput
from sgl_lim.serving.reads import plan_reads
from sgl_lim.serving.recorder import Recorder
from support.driven_layers import build_method, score_rows_at_once
from support.set_oracle import SetRule

BUDGETS, LAYERS, HEADS, KV_HEADS, DIM, SLOTS = (12, 20, 64), 4, 4, 2, 8, 300
STEPS = ((9, 31, 20, 21, 12), (40, 13), (64, 5), (7, 12))
SCALING = Scaling(scale=0.9)
ALL_HEADS = HeadsOfRank(first=0, own=HEADS, all=HEADS)
RULES = [
    ("lessismore", "union", "global"),
    ("lessismore", "max", "global"),
    ("lessismore", "sum", "global"),
    ("lessismore", "union", "kv_head"),
    ("tidaldecode", "max", "kv_head"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the operator leaves undefined may hold anything."""

    def poison(q, k_cache, v_cache, slots, seq_lens, scaling, *, score_beyond):
        out, lse, logits = decode_with_scores(q, k_cache, v_cache, slots, seq_lens, scaling)
        undefined = torch.arange(logits.shape[2]) >= seq_lens.unsqueeze(1)
        undefined |= (seq_lens <= score_beyond).unsqueeze(1)
        return out, lse, logits.masked_fill(undefined.unsqueeze(1), float("nan"))

    monkeypatch.setattr(under_test, "decode_with_scores", poison)


def rules(name, aggregate, scope):
    values = {"recency": 0.25, "sinks": 2, "aggregate": aggregate, "selection_layers": (0,), "scope": scope}
    return [build_method(name, budget=budget, **values) for budget in BUDGETS]


def steps():
    """Slots and lengths of each step, then queries and caches of each layer."""
    generator = torch.Generator().manual_seed(3)
    for lens in STEPS:
        slots = torch.stack([torch.randperm(SLOTS, generator=generator)[: max(lens)] for _ in lens]).to(torch.int32)
        layers = []
        for _ in range(LAYERS):
            k, v = (torch.randn(SLOTS, KV_HEADS, DIM, generator=generator) for _ in range(2))
            layers.append((torch.randn(len(lens), HEADS, DIM, generator=generator), k, v))
        yield plan_reads(Full(), slots, torch.tensor(lens, dtype=torch.int32), own_heads=HEADS), layers


def run(recorder, heads=slice(None), kv_heads=slice(None)):
    """Drive the recorder with some of the heads; returns its outputs."""
    outs = []
    for plan, layers in steps():
        for layer, (q, k, v) in enumerate(layers):
            operands = q[:, heads].contiguous(), k[:, kv_heads].contiguous(), v[:, kv_heads].contiguous()
            outs.append(recorder.attend(layer, plan, LayerInput(*operands, SCALING)))
    return outs


def expected(aggregate, scope, method):
    """Sums by the definition: [budgets, layers, layers] float64, and outputs."""
    sums, outs = torch.zeros(len(BUDGETS), LAYERS, LAYERS, dtype=torch.float64), []
    recency, sinks = (0, 0) if method == "tidaldecode" else (0.25, 2)
    for plan, layers in steps():
        outs += [torch.empty(len(plan.seq_lens), HEADS, DIM, dtype=torch.float64) for _ in layers]
        for row, length in enumerate(plan.seq_lens.tolist()):
            where = plan.context.slots[row, :length].long()
            weights, logits = [], []
            for layer, (q, k, v) in enumerate(layers):
                keys = k[where].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
                values = v[where].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
                logits.append(torch.einsum("hd,thd->ht", q[row].double(), keys) * SCALING.scale)
                weights.append(logits[-1].softmax(dim=1))
                outs[layer - LAYERS][row] = torch.einsum("ht,thd->hd", weights[-1], values)
            for b, budget in enumerate(BUDGETS):
                if length <= budget:
                    continue
                rule = SetRule("lessismore", budget, recency, sinks, aggregate)
                for i in range(LAYERS):
                    groups = [range(HEADS)] if scope == "global" else [range(2), range(2, 4)]
                    for heads in groups:
                        chosen = rule.choose(logits[i][list(heads)], length)
                        for j in range(i, LAYERS):
                            sums[b, i, j] += weights[j][list(heads)][:, chosen].sum() / HEADS
    return sums, outs


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("method", "aggregate", "scope"), RULES)
def test_sums_are_the_definition_s(method, aggregate, scope, in_parts, monkeypatch):
    if in_parts:
        score_rows_at_once(monkeypatch, 2, heads=HEADS, width=max(max(lens) for lens in STEPS))
    recorder = Recorder(rules(method, aggregate, scope), LAYERS, ALL_HEADS, None, "cpu")
    outs = run(recorder)
    sums, wanted = expected(aggregate, scope, method)
    got = recorder.read()
    assert got["budgets"] == list(BUDGETS)
    assert got["rows"] == [sum(n > budget for lens in STEPS for n in lens) for budget in BUDGETS] == [6, 4, 0]
    torch.testing.assert_close(torch.tensor(got["sums"], dtype=torch.float64), sums, rtol=0, atol=2e-5)
    for out, right in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out.double(), right, rtol=1e-4, atol=1e-5)


class Ranks:
    """Two ranks in threads that exchange what they reduce."""

    def __init__(self):
        self._barrier, self._given = threading.Barrier(2, timeout=60), [None, None]

    def share(self, rank):
        def combine(scores, how):
            self._given[rank] = scores
            self._barrier.wait()
            both = torch.stack(self._given)
            self._barrier.wait()
            return both.logsumexp(dim=0) if how == "logsumexp" else both.amax(dim=0)

        own = HEADS // 2
        return HeadsOfRank(first=rank * own, own=own, all=HEADS), combine


@pytest.mark.parametrize(("method", "aggregate", "scope"), RULES[:4])
def test_every_rank_comes_to_the_sums_over_all_heads(method, aggregate, scope):
    ranks = Ranks()
    recorders = [Recorder(rules(method, aggregate, scope), LAYERS, *ranks.share(rank), "cpu") for rank in range(2)]
    halves = [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]
    threads = [
        threading.Thread(target=run, args=(recorder, *half)) for recorder, half in zip(recorders, halves, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sums, _ = expected(aggregate, scope, method)
    for recorder in recorders:
        got = recorder.read()
        assert got["rows"] == [6, 4, 0]
        torch.testing.assert_close(torch.tensor(got["sums"], dtype=torch.float64), sums, rtol=0, atol=2e-5)


def test_layers_out_of_order_are_an_error():
    recorder = Recorder(rules("lessismore", "union", "global"), LAYERS, ALL_HEADS, None, "cpu")
    first, second = list(steps())[:2]
    recorder.attend(0, first[0], LayerInput(*first[1][0], SCALING))
    with pytest.raises(RuntimeError, match="layer 2 ran where layer 1"):
        recorder.attend(2, first[0], LayerInput(*first[1][2], SCALING))
    with pytest.raises(RuntimeError, match="layer 1 ran where layer 1 of the same step"):
        recorder.attend(1, second[0], LayerInput(*second[1][1], SCALING))
