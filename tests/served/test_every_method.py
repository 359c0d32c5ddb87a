"""Every method that is registered: an answer depends neither on company, nor on the cache, nor on how a prompt came in.

Sets and attention are compared with the oracle, and a budget that covers the context with dense decode, for every
method and on the same servers, in test_sparse_decode.py and test_dense_equality.py.
"""

import pytest
import torch

from sgl_lim.methods import METHODS
from support.agreement import largest_difference, same_tokens
from support.fleet import CHUNK, METHOD_CASES, Fleet, LimCase, random_prompt
from support.server import Server

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", METHOD_CASES, ids=str, indirect=True)]

TOKENS = 20
PREFIX = random_prompt(407, 230)
PROMPTS = [
    random_prompt(61, 231),
    random_prompt(247, 232),  # crosses the budget while it decodes
    random_prompt(777, 233),  # prefilled in chunks
    *([*PREFIX, *random_prompt(length, 234 + length)] for length in (3, 30)),
]


def test_answers_depend_on_neither_company_nor_cache_nor_chunks(case: LimCase, fleet: Fleet, server: Server) -> None:
    assert set(METHODS) == {case.rule.method for case in METHOD_CASES} and len(PROMPTS[2]) > CHUNK
    error, magnitude = fleet.dense_run(case).noise_beyond
    bound = 2 * error + torch.finfo(torch.float32).eps * magnitude
    server.flush_cache()
    alone = [server.generate_one(prompt, TOKENS) for prompt in PROMPTS]
    hit = len(PREFIX) // case.page_size * case.page_size
    assert [answer.cached_tokens for answer in alone] == [0, 0, 0, 0, hit]
    cached = server.generate(PROMPTS, TOKENS)
    assert all(answer.cached_tokens > 0 for answer in cached)
    server.flush_cache()
    cold = server.generate(PROMPTS, TOKENS)
    for answers in (cached, cold):
        assert same_tokens(answers, alone)
        assert largest_difference(answers, alone) <= bound
