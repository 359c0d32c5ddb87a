"""Does an answer depend on what else the server decodes, or on what it has cached?"""

import pytest
import torch

from support.agreement import largest_difference, same_tokens
from support.fleet import MAIN, NEXT_CASES, Fleet, LimCase, random_prompt
from support.server import Server

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", [MAIN, *NEXT_CASES], ids=str, indirect=True)]

SHORT, LONG = random_prompt(61, 200), random_prompt(613, 201)
CROWD = [random_prompt(length, 210 + length) for length in (3, 700, 250, 19, 401, 120)]


def bound(case: LimCase, fleet: Fleet) -> float:
    """Two runs differ by no more than each of them from float64."""
    error, magnitude = fleet.dense_run(case).noise_beyond
    return 2 * error + torch.finfo(torch.float32).eps * magnitude


def test_answers_do_not_depend_on_the_batch(case: LimCase, fleet: Fleet, server: Server) -> None:
    alone = [server.generate_one(prompt) for prompt in (SHORT, LONG)]
    together = server.generate([*CROWD[:3], SHORT, *CROWD[3:], LONG])
    among = [together[3], together[-1]]
    assert same_tokens(alone, among)
    assert largest_difference(alone, among) <= bound(case, fleet)
    with_short = server.generate([SHORT, CROWD[0], CROWD[3]])[:1]
    with_long = server.generate([CROWD[1], LONG, CROWD[4]])[1:2]
    assert same_tokens(alone, [*with_short, *with_long])
    assert largest_difference(alone, [*with_short, *with_long]) <= bound(case, fleet)


def test_answers_do_not_depend_on_when_others_come_and_go(case: LimCase, server: Server) -> None:
    jobs = [(prompt, 8 + 5 * i) for i, prompt in enumerate([*CROWD, SHORT, LONG])]
    apart = server.generate_apart(jobs)
    alone = [server.generate_one(*job) for job in jobs]
    assert same_tokens(apart, alone)
    assert [len(answer.tokens) for answer in apart] == [tokens for _, tokens in jobs]


@pytest.mark.parametrize("length", [61, 613], ids=["within-the-budget", "beyond-the-budget"])
def test_a_repeated_prompt_hits_the_cache_and_answers_the_same(
    case: LimCase, fleet: Fleet, server: Server, length: int
) -> None:
    prompt = random_prompt(length, 220)
    first, second = server.generate_one(prompt), server.generate_one(prompt)
    assert first.cached_tokens == 0
    # The last token of a prompt is always computed, and only whole pages are shared.
    assert second.cached_tokens == (length - 1) // case.page_size * case.page_size
    assert same_tokens([first], [second])
    assert largest_difference([first], [second]) <= bound(case, fleet)


def test_a_second_turn_reuses_what_was_generated(case: LimCase, server: Server) -> None:
    prompt = random_prompt(300, 221)
    first = server.generate_one(prompt)
    second = server.generate_one([*prompt, *first.tokens, *random_prompt(9, 222)])
    generated = len(prompt) + len(first.tokens)
    # The last token generated is fed back only if the overlap scheduler has started a step too many.
    assert second.cached_tokens in {n // case.page_size * case.page_size for n in (generated - 1, generated)}
