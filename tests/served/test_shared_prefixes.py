"""Requests that share a prefix: is it read once for them, and does each still get the answer it would get alone?

Rounding may turn a tie between two tokens of a set, so what a step computes is compared with the oracles, and answers
by their tokens.
"""

import pytest

from support.agreement import same_tokens
from support.fleet import LAYERS, MAIN, NEXT_CASES, Fleet, LimCase, random_prompt
from support.server import Server
from support.step_checks import check_steps

# Layers that choose for themselves read no whole context beyond the budget, and so nothing together.
CASES = [MAIN, *(case for case in NEXT_CASES if case.rule.method == "lessismore")]
pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", CASES, ids=str, indirect=True)]

SYSTEM = random_prompt(300, 400)
PROBLEMS = [[*SYSTEM, *random_prompt(290, 410 + n)] for n in range(4)]


def branches(prompt: list[int], count: int, seed: int) -> list[list[int]]:
    """Prompts that go on from one prefix, each by a few tokens of its own."""
    return [[*prompt, *random_prompt(5 + n, seed + n)] for n in range(count)]


def test_branches_of_one_prefix(case: LimCase, fleet: Fleet, server: Server) -> None:
    prompts = branches(PROBLEMS[0], 8, 500)
    alone = [server.generate_one(prompt) for prompt in prompts]
    before = server.counters()
    with fleet.probe.recording():
        assert same_tokens(server.generate(prompts), alone)
    check_steps(case, fleet.probe.steps(LAYERS)[::5])
    grown = server.counted_since(before)
    # The prefix is in the cache, so that all eight hold its slots from the first step on: seven of them read nothing
    # of the 512 tokens (in granules of 128) in one dense and two selection layers.
    assert grown["tokens_shared"] >= 3 * 7 * 512 * grown["decode_steps"] * 0.9
    assert grown["rows_grouped"] >= 8 * grown["decode_steps"] * 0.9


def test_requests_over_several_prefixes_with_a_common_start(case: LimCase, fleet: Fleet, server: Server) -> None:
    prompts = [prompt for n, problem in enumerate(PROBLEMS) for prompt in branches(problem, 4, 520 + 10 * n)]
    alone = [server.generate_one(prompt, 12) for prompt in prompts]
    # In an order that mixes the groups.
    order = sorted(range(len(prompts)), key=lambda n: (n % 4, n))
    before = server.counters()
    with fleet.probe.recording():
        together = server.generate([prompts[n] for n in order], 12)
    assert same_tokens(together, [alone[n] for n in order])
    check_steps(case, fleet.probe.steps(LAYERS)[::4])
    grown = server.counted_since(before)
    # Sixteen rows: 256 tokens of all, and 256 more of each problem's four.
    assert grown["tokens_shared"] >= 3 * (15 * 256 + 4 * 3 * 256) * grown["decode_steps"] * 0.7


def test_groups_that_form_and_dissolve_while_decoding(case: LimCase, server: Server) -> None:
    prompts = [*branches(PROBLEMS[1], 3, 560), *branches(PROBLEMS[2], 3, 570), random_prompt(410, 580)]
    jobs = [(prompt, 6 + 7 * n) for n, prompt in enumerate(prompts)]
    server.flush_cache()
    apart = server.generate_apart(jobs)
    assert same_tokens(apart, [server.generate_one(*job) for job in jobs])


def test_equal_prompts_that_arrive_together(case: LimCase, server: Server) -> None:
    """All are computed cold; after their prefill SGLang replaces the duplicates by the slots of one."""
    prompt = random_prompt(530, 590)
    server.flush_cache()
    before = server.counters()
    answers = server.generate([prompt] * 4)
    assert same_tokens(answers, answers[:1] * 4)
    assert server.counted_since(before)["tokens_shared"] > 0
    assert same_tokens(answers[:1], [server.generate_one(prompt)])


def test_a_conversation_goes_on_beside_its_branches(case: LimCase, server: Server) -> None:
    first = server.generate_one(PROBLEMS[3])
    turn = [*PROBLEMS[3], *first.tokens, *random_prompt(11, 600)]
    prompts = [turn, *branches(turn, 3, 610), *branches(PROBLEMS[3], 3, 620)]
    alone = [server.generate_one(prompt) for prompt in prompts]
    assert same_tokens(server.generate(prompts), alone)
