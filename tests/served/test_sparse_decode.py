"""Beyond the budget: is the served set the paper's set, and is the served attention attention over that set?

The server's own queries, keys and values are recorded layer by layer; the expected sets and outputs are computed from
them in float64, so selection, attention and the model's arithmetic are never mixed.
"""

import pytest

from support.fleet import FLOAT32_CASES, LAYERS, NEXT_CASES, Fleet, LimCase, prompts_beyond
from support.server import Server
from support.step_checks import check_answers, check_steps

pytestmark = [
    pytest.mark.served,
    pytest.mark.parametrize("case", [*FLOAT32_CASES, *NEXT_CASES], ids=str, indirect=True),
]

TOKENS = 10


def test_sets_and_answers_equal_the_oracle(case: LimCase, fleet: Fleet, server: Server) -> None:
    prompts = prompts_beyond(case.rule.budget)
    with fleet.probe.recording():
        answers = server.generate(prompts, TOKENS)
    steps = fleet.probe.steps(LAYERS)
    assert max(len(step[0]["seq_lens"]) for step in steps) == len(prompts), "the requests never shared a step"
    check_steps(case, steps)
    check_answers(case, fleet, prompts, answers, steps)
