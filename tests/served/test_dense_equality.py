"""With a budget that covers the context, are the answers those of the dense backend?"""

import pytest
import torch

from support.agreement import errors, largest_difference, same_tokens
from support.fleet import FLOAT32_CASES, LOW_PRECISION, NEW_TOKENS, NEXT_CASES, Fleet, LimCase, prompts_within
from support.float64_qwen3 import Float64Qwen3
from support.server import Answer, Server

pytestmark = pytest.mark.served


@pytest.mark.parametrize("case", [*FLOAT32_CASES, *NEXT_CASES], ids=str, indirect=True)
def test_a_budget_that_covers_the_context_is_dense(case: LimCase, fleet: Fleet, server: Server) -> None:
    dense, bound = fleet.dense_run(case), twice_the_dense_error(case, fleet)
    answers, error = answers_and_error(case, fleet, server)
    assert same_tokens(answers, dense.within)
    assert error <= bound
    assert largest_difference(answers, dense.within) <= 2 * bound


@pytest.mark.parametrize("case", [LOW_PRECISION], ids=str, indirect=True)
def test_low_precision_is_as_near_to_float64_as_dense(case: LimCase, fleet: Fleet, server: Server) -> None:
    bound = twice_the_dense_error(case, fleet)
    assert answers_and_error(case, fleet, server)[1] <= bound


def answers_and_error(case: LimCase, fleet: Fleet, server: Server) -> tuple[list[Answer], float]:
    """The lessismore server's answers within the budget, and their error against float64."""
    prompts = prompts_within(case.rule.budget)
    answers = server.generate(prompts, NEW_TOKENS)
    model = Float64Qwen3(fleet.model(case.kind), getattr(torch, case.dtype))
    return answers, errors(model, prompts, answers)[0]


def twice_the_dense_error(case: LimCase, fleet: Fleet) -> float:
    """Twice the dense backend's own error against float64, plus one rounding of a log-probability."""
    error, magnitude = fleet.dense_run(case).noise_within
    return 2 * error + torch.finfo(getattr(torch, case.dtype)).eps * magnitude
