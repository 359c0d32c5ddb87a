"""Requests that share a prefix and choose its tokens together: the rule's sets, and attention over them, in every step.

Answers are not those that each would get alone: a set depends on who shares the prefix.
"""

import pytest

from support.fleet import GROUP, LAYERS, Fleet, LimCase, random_prompt
from support.server import Server
from support.step_checks import check_steps

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", [GROUP], ids=str, indirect=True)]

SYSTEM = random_prompt(300, 700)
PROBLEMS = [[*SYSTEM, *random_prompt(290, 710 + n)] for n in range(2)]


def test_groups_within_groups_beside_rows_of_their_own(case: LimCase, fleet: Fleet, server: Server) -> None:
    prompts = [[*problem, *random_prompt(5 + n, 720 + n)] for problem in PROBLEMS for n in range(3)]
    # Too short to be sparse, and long with nothing in common.
    prompts += [SYSTEM[:150], random_prompt(410, 730)]
    for problem in PROBLEMS:
        server.generate_one(problem, 1)
    before = server.counters()
    with fleet.probe.recording():
        server.generate(prompts, 16)
    steps = fleet.probe.steps(LAYERS)
    assert len(steps) >= 10
    check_steps(case, steps[::3])
    grown = server.counted_since(before)
    # In three full layers six rows have 256 tokens in common, and three another 256. In three sparse layers the sets of
    # either problem's rows have most of their 256 tokens in common.
    full = 3 * (5 * 256 + 2 * 2 * 256)
    assert grown["tokens_shared"] >= (full + 3 * 2 * 2 * 128) * grown["decode_steps"] * 0.8
    assert grown["tokens_attended"] < grown["tokens_dense"]


def test_server_info_names_the_selection(case: LimCase, server: Server) -> None:
    assert server.lessismore()["prefix_selection"] == "group"
