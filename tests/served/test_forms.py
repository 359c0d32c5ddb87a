"""Every way to turn the backend on gives the same answers: flags, environment, hybrid form, `sgl.Engine`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.agreement import largest_difference, same_tokens
from support.fleet import COMMON_ARGS, MAIN, NEW_TOKENS, Fleet, LimCase, prompts_beyond, prompts_within
from support.server import Answer, ServerPool, ServerSpec, launch_env

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", [MAIN], ids=str, indirect=True)]

PROMPTS = [*prompts_within(MAIN.rule.budget)[2:5], *prompts_beyond(MAIN.rule.budget)]
CONFIG = {"budget": 256, "recency": 0.25, "sinks": 4, "selection_layers": [1, 3], "aggregate": "union"}
ENGINE = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    request = json.load(sys.stdin)
    engine = sgl.Engine(**request["engine"])
    try:
        print("ANSWERS " + json.dumps(engine.generate(**request["generate"])))
    finally:
        engine.shutdown()
"""


@pytest.fixture(scope="module")
def main_answers(case: LimCase, fleet: Fleet, pool: ServerPool) -> list[Answer]:
    """What `--attention-backend lessismore` with flags answers."""
    return pool.get(fleet.lim_spec(case), beside=hybrid_spec(fleet)).generate(PROMPTS, NEW_TOKENS)


def hybrid_spec(fleet: Fleet) -> ServerSpec:
    """Dense prefill by name, our decode, settings from the environment."""
    args = ("--attention-backend", "torch_native", "--decode-attention-backend", "lessismore", "--dtype", "float32")
    return ServerSpec(
        "hybrid", fleet.model("gqa"), (*args, *COMMON_ARGS), env=(("LESSISMORE_CONFIG", json.dumps(CONFIG)),)
    )


def test_hybrid_form_with_settings_from_the_environment(
    case: LimCase, fleet: Fleet, pool: ServerPool, main_answers: list[Answer]
) -> None:
    error, magnitude = fleet.dense_run(case).noise_beyond
    server = pool.get(hybrid_spec(fleet))
    answers = server.generate(PROMPTS, NEW_TOKENS)
    block = server.lessismore()
    assert {key: block[key] for key in CONFIG} == CONFIG
    assert block["counters"]["selections"] > 0
    assert same_tokens(answers, main_answers)
    assert largest_difference(answers, main_answers) <= 2 * error + torch.finfo(torch.float32).eps * magnitude


def test_engine_with_settings_from_the_environment(fleet: Fleet, main_answers: list[Answer], tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    request = {
        "engine": {
            "model_path": str(fleet.model("gqa")),
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "lessismore",
            "max_total_tokens": 8192,
            "max_running_requests": 32,
            "log_level": "info",
        },
        "generate": {
            "input_ids": PROMPTS,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        },
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=launch_env((("LESSISMORE_CONFIG", json.dumps(CONFIG)),)),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sgl-lim is on: method lessismore, budget 256" in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    tokens = [tuple(item["output_ids"]) for item in json.loads(line.removeprefix("ANSWERS "))]
    assert tokens == [answer.tokens for answer in main_answers]
