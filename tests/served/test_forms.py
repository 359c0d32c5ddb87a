"""Every way to turn the backend on gives the same answers: flags, environment, hybrid form, `sgl.Engine`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_lim.settings.config import ENV
from support.fleet import HYBRID, MAIN, NEW_TOKENS, Fleet, LimCase, prompts_beyond, prompts_within
from support.server import Server, launch_env

pytestmark = pytest.mark.served

PROMPTS = [*prompts_within(MAIN.rule.budget)[2:5], *prompts_beyond(MAIN.rule.budget)]
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


@pytest.mark.parametrize("case", [HYBRID], ids=str, indirect=True)
def test_hybrid_form_takes_settings_from_the_environment(case: LimCase, server: Server) -> None:
    """Its sets and answers are compared with the oracle like every case's, in test_sparse_decode.py."""
    block, settings = server.lessismore(), case.settings()
    assert {key: block[key] for key in settings} == settings
    before = server.counters()["selections"]
    server.generate(PROMPTS[-1:], 2)
    assert server.counters()["selections"] > before


@pytest.mark.parametrize("case", [MAIN], ids=str, indirect=True)
def test_engine_answers_as_the_server_does(case: LimCase, fleet: Fleet, server: Server, tmp_path: Path) -> None:
    expected = server.generate(PROMPTS, NEW_TOKENS)
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
        env=launch_env(((ENV, json.dumps(case.settings())),)),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sgl-lim is on: method lessismore, budget 256" in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    tokens = [tuple(item["output_ids"]) for item in json.loads(line.removeprefix("ANSWERS "))]
    assert tokens == [answer.tokens for answer in expected]
