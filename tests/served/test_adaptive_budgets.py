"""Adaptive budgets on a server: do sets hold what they are to hold, and are the tokens attended counted as read?"""

from dataclasses import replace

import pytest
import torch

from support.adaptive_oracle import explains_adaptive
from support.fleet import FLOAT32_CASES, LAYERS, ROLES, Fleet, LimCase, prompts_beyond
from support.server import Server, ServerPool
from support.set_oracle import SetRule
from support.step_checks import check_attention, exact_logits, served_sets

TOP_P, FLOOR, TOKENS = 0.3, 40, 10
GLOBAL = LimCase("mqa", 1, SetRule("lessismore", 193, 0.25, 4, "sum"))
PER_HEAD = replace(FLOAT32_CASES[1], rule=replace(FLOAT32_CASES[1].rule, scope="kv_head"))
pytestmark = [
    pytest.mark.served,
    pytest.mark.parametrize("case", [GLOBAL, PER_HEAD], ids=str, indirect=True),
]


@pytest.fixture
def adaptive(case: LimCase, fleet: Fleet, pool: ServerPool) -> Server:
    spec = fleet.lim_spec(case)
    args = (*spec.args, "--lim-top-p", str(TOP_P), "--lim-top-p-floor", str(FLOOR), "--lim-recency", "auto")
    return pool.get(replace(spec, name=f"{spec.name}-adaptive", args=args))


def test_sets_are_as_large_as_the_attention_asks_for(case: LimCase, fleet: Fleet, adaptive: Server) -> None:
    rule = case.rule
    sizes = {"budget": rule.budget, "sinks": rule.sinks, "top_p": TOP_P, "floor": FLOOR}
    before = adaptive.counters()
    prompts = prompts_beyond(rule.budget)
    with fleet.probe.recording():
        adaptive.generate(prompts, TOKENS)
    # Each row runs one step more than its tokens need, which is thrown away; no two rows have the same length.
    thrown_away, attended, rows, seen = {len(prompt) + TOKENS for prompt in prompts}, 0.0, 0, set()
    for step in fleet.probe.steps(LAYERS):
        for row, length in enumerate(step[0]["seq_lens"].tolist()):
            rows += 1
            for record in step:
                place = f"layer {record['layer']} ({record['role']}), context {length}"
                q, k, v = record["q"][row], record["keys"][row, :length], record["values"][row, :length]
                read = [list(range(length))]
                if record["role"] == "select":
                    kept = served_sets(record, row, length)
                    exact, slack = (x.unflatten(0, (len(kept), -1)) for x in exact_logits(q, k, record["scale"]))
                    for head, chosen in enumerate(kept):
                        seen.add(len(chosen))
                        if length <= rule.budget:
                            assert chosen == read[0], place
                            continue
                        error = float(torch.expm1(4 * slack[head].max())) + 1e-5
                        scores = rule.scores(exact[head].double())
                        assert explains_adaptive(chosen, scores, **sizes, error=error), place
                elif record["role"] == "sparse":
                    read = served_sets(record, row, length)
                    assert read == kept, f"{place}: the set in force is not the one chosen"
                attended += sum(map(len, read)) / len(read) * (length not in thrown_away)
                qs, outs = (x.unflatten(0, (len(read), -1)) for x in (q, record["out"][row]))
                ks, vs = (x.unflatten(1, (len(read), -1)) for x in (k, v))
                for n, held in enumerate(read):
                    check_attention(qs[n], ks[held, n], vs[held, n], record["scale"], outs[n], place)
    assert len(seen) > 5, "sets of few sizes would pass as well"
    grown = adaptive.counted_since(before)
    # Each selection layer's share of a token is rounded down, row by row.
    assert attended - ROLES.count("select") * rows <= grown["tokens_attended"] <= attended + 1e-6


def test_settings_are_shown(case: LimCase, adaptive: Server) -> None:
    block = adaptive.lessismore()
    assert [block[name] for name in ("top_p", "top_p_floor", "recency")] == [TOP_P, FLOOR, "auto"]
