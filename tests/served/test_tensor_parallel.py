"""Ranks hold a part of the heads each and must choose one set: that of all heads."""

import os
from dataclasses import replace

import pytest
import torch

from support.agreement import errors
from support.fleet import (
    GROUP,
    HEADS,
    LAYERS,
    MAIN,
    NEW_TOKENS,
    NEXT_CASES,
    Fleet,
    LimCase,
    prompts_beyond,
    prompts_within,
    random_prompt,
)
from support.float64_qwen3 import Float64Qwen3
from support.server import Server, ServerPool
from support.set_oracle import SetRule
from support.step_checks import check_answers, check_steps

TOKENS = 10
MANY_RANKS = "SGL_LIM_MANY_RANKS"
SUM = replace(GROUP, rule=replace(MAIN.rule, aggregate="sum"))
MANY_CASES = (
    LimCase("many", 1, SetRule("lessismore", 256, 0.25, 4, "union")),
    LimCase("many", 16, SetRule("lessismore", 256, 0.25, 4, "max"), prefix_selection="group"),
    LimCase("many", 1, SetRule("lessismore", 256, 0.25, 4, "union", "kv_head")),
    LimCase("many", 16, SetRule("tidaldecode", 256, 0.0, 0, "max", "kv_head")),
    LimCase("many", 16, SetRule("quest", 256, 0.0, 0, "max", "kv_head")),
)
PAGED = ("quest",)
"""Methods whose groups are counted only within the budget."""
pytestmark = [
    pytest.mark.served,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores"),
]
many = pytest.mark.skipif(
    not os.environ.get(MANY_RANKS),
    reason=f"more than two ranks take minutes on few cores; set {MANY_RANKS}=1 to run them",
)


def start(case: LimCase, ranks: int, fleet: Fleet, pool: ServerPool) -> Server:
    """A server of `case` whose ranks share the machine's cores."""
    spec = fleet.lim_spec(case)
    cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
    # The first binds ranks to cores. On 0.5.17 the second keeps a CPU group from loading NCCL.
    env = (("SGLANG_CPU_OMP_THREADS_BIND", cores), ("SGLANG_NCCL_SO_PATH", "/nonexistent.so"))
    args = (*spec.args, "--tp-size", str(ranks))
    return pool.get(replace(spec, name=f"{spec.name}-tp{ranks}", args=args, env=(*spec.env, *env)))


# "sum" combines the ranks' scores by sum, and here those of a prefix group's rows as well; "union" by maximum.
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (SUM, 2),
        (NEXT_CASES[0], 2),
        *(pytest.param(case, ranks, marks=many) for ranks in (4, 8) for case in MANY_CASES),
    ],
    ids=str,
    indirect=["case"],
)
def test_ranks_choose_the_set_of_all_heads(case: LimCase, ranks: int, fleet: Fleet, pool: ServerPool) -> None:
    noise, magnitude = fleet.dense_run(case).noise_within
    server = start(case, ranks, fleet, pool)

    assert server.log().count("sgl-lim is on:") == 1, "the first rank speaks for all"
    prompts = prompts_beyond(case.rule.budget)
    with fleet.probe.recording():
        answers = server.generate(prompts, TOKENS)
    steps = fleet.probe.steps(LAYERS)
    assert steps[0][0]["q"].shape[1] == HEADS[case.kind][0], "the records of a part of the ranks only"
    check_steps(case, steps)
    check_answers(case, fleet, prompts, answers, steps)

    # Ranks that found other groups than one another would exchange scores of other sets, or wait for ever.
    prefix = random_prompt(400, 800)
    prompts = [[*prefix, *random_prompt(4 + n, 801 + n)] for n in range(4)]
    server.generate_one(prefix, 1)
    before = server.counters()
    with fleet.probe.recording():
        server.generate(prompts, TOKENS)
    if case.rule.method not in PAGED:
        assert server.counters()["tokens_shared"] > before["tokens_shared"]
    check_steps(case, fleet.probe.steps(LAYERS))

    prompts = prompts_within(case.rule.budget)
    error, _ = errors(
        Float64Qwen3(fleet.model(case.kind), torch.float32), prompts, server.generate(prompts, NEW_TOKENS)
    )
    assert error <= 2 * noise + torch.finfo(torch.float32).eps * magnitude
