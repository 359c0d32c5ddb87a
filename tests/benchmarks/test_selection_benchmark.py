"""Does the benchmark of prefix selection decode siblings of one context, as the model's own evaluation does?"""

import random
from pathlib import Path

import pytest
import torch
from chain_tracer.decode import Policy, prefill, score
from chain_tracer.model import ChainTracer, load_checkpoint

from benchmarks.prefix_selection import Compared, Pool, decode, measure, siblings
from sgl_lim.methods import Full, LessIsMore
from sgl_lim.tasks.chains import make_chain

MODEL = Path(__file__).parents[2] / "models/chain-tracer"
FACTS, STEPS, SELECTION = 60, 6, (2, 8)


@pytest.fixture(scope="module")
def model():
    tracer = ChainTracer(dtype=torch.float32).requires_grad_(False)
    load_checkpoint(tracer, MODEL)
    return tracer


@pytest.fixture(scope="module")
def problems():
    draw = random.Random(0)
    contexts = [make_chain(draw, num_facts=FACTS, num_steps=STEPS) for _ in range(2)]
    return [list(siblings(context, 3, STEPS, draw)) for context in contexts]


def test_siblings_are_problems_of_the_same_facts():
    draw = random.Random(1)
    context = make_chain(draw, num_facts=FACTS, num_steps=STEPS)
    all_of_them = list(siblings(context, FACTS, STEPS, draw))
    assert context.solution in [problem.solution for problem in all_of_them]
    assert context.prompt in [problem.prompt for problem in all_of_them]
    assert len({problem.prompt for problem in all_of_them}) == FACTS
    assert len({problem.prompt.split(" ? ")[0] for problem in all_of_them}) == 1


@pytest.mark.parametrize("budget", [None, 24, 48])
def test_rows_decode_as_in_the_model_s_evaluation(model, problems, budget):
    """At small budgets some words are wrong, and it has to be the same ones."""
    pool = Pool(model, problems)
    method, policy = Full(2048, 0.25, 4, "union", SELECTION), Policy("full")
    if budget is not None:
        method, policy = LessIsMore(budget, 0.25, 4, "union", SELECTION), Policy("lessismore", budget, SELECTION)
    right, steps = decode(model, pool, method)
    flat = [problem for group in problems for problem in group]
    assert torch.equal(right, score(model, prefill(model, flat), policy))
    assert len(steps) == right.shape[1] - 1 and steps[0].groups.counts.max() == 3


def test_overlap_is_with_the_sets_of_rows_that_choose_alone(model, problems):
    row = measure(model, Pool(model, problems), Compared(96, 0.25, 4, "union", SELECTION, "group"))
    assert 0 < float(row["overlap_ranked"]) < float(row["overlap"]) < 1
    assert 0 < float(row["read_once"]) < 2 / 3 and float(row["set_tokens"]) <= 96
    alone = measure(
        model, Pool(model, [group[:1] for group in problems]), Compared(96, 0.25, 4, "union", SELECTION, "group")
    )
    assert float(alone["overlap"]) == 1 and float(alone["read_once"]) == 0
