"""Two ranks hold half of the heads each and must choose one set: that of all heads."""

import os
from dataclasses import replace

import pytest
import torch

from support.agreement import errors
from support.fleet import (
    GROUP,
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
from support.server import ServerPool
from support.step_checks import check_answers, check_steps

TOKENS = 10
SUM = replace(GROUP, rule=replace(MAIN.rule, aggregate="sum"))
pytestmark = [
    pytest.mark.served,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores"),
    # "sum" combines the ranks' scores by sum, and here those of a prefix group's rows as well; "union" by maximum.
    pytest.mark.parametrize("case", [SUM, NEXT_CASES[0]], ids=str, indirect=True),
]


def test_two_ranks_choose_the_set_of_all_heads(case: LimCase, fleet: Fleet, pool: ServerPool) -> None:
    noise, magnitude = fleet.dense_run(case).noise_within
    spec = fleet.lim_spec(case)
    # The first binds ranks to cores. On 0.5.17 the second keeps a CPU group from loading NCCL.
    env = (("SGLANG_CPU_OMP_THREADS_BIND", "0|1"), ("SGLANG_NCCL_SO_PATH", "/nonexistent.so"))
    args = (*spec.args, "--tp-size", "2")
    server = pool.get(replace(spec, name=f"{spec.name}-tp2", args=args, env=(*spec.env, *env)))

    assert server.log().count("sgl-lim is on:") == 1, "the first rank speaks for all"
    prompts = prompts_beyond(case.rule.budget)
    with fleet.probe.recording():
        answers = server.generate(prompts, TOKENS)
    steps = fleet.probe.steps(LAYERS)
    assert steps[0][0]["q"].shape[1] == 8, "the records of one rank only"
    check_steps(case, steps)
    check_answers(case, fleet, prompts, answers, steps)

    # Ranks that found other groups than one another would exchange scores of other sets, or wait for ever.
    prefix = random_prompt(400, 800)
    prompts = [[*prefix, *random_prompt(4 + n, 801 + n)] for n in range(4)]
    server.generate_one(prefix, 1)
    before = server.counters()
    with fleet.probe.recording():
        server.generate(prompts, TOKENS)
    assert server.counters()["tokens_shared"] > before["tokens_shared"]
    check_steps(case, fleet.probe.steps(LAYERS))

    prompts = prompts_within(case.rule.budget)
    error, _ = errors(Float64Qwen3(fleet.model("gqa"), torch.float32), prompts, server.generate(prompts, NEW_TOKENS))
    assert error <= 2 * noise + torch.finfo(torch.float32).eps * magnitude
