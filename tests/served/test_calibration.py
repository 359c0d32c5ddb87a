"""A calibration, and servers that find it without a flag or take it by one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from sgl_lim.settings import kept_calibration, preset_file
from support.fleet import NEXT_PYTHON, interpreter
from support.server import AS_USERS, ServerPool, ServerSpec, launch_env

from .conftest import CHAIN_TRACER

pytestmark = pytest.mark.served

BUDGET = 64


@pytest.fixture(scope="module", params=["current", "next"])
def release(request: pytest.FixtureRequest) -> str:
    """A SGLang release."""
    if request.param == "next" and not os.environ.get(NEXT_PYTHON):
        pytest.skip(f"{NEXT_PYTHON} does not name the Python of an environment with the next SGLang release")
    return request.param


@pytest.fixture(scope="module")
def calibrated(release: str, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset that the command writes; its folder `kept` has the same for the checkpoint."""
    pool.close()
    preset = tmp_path_factory.mktemp("calibrated") / "out" / "preset.json"
    command = [interpreter(release), "-m", "sgl_lim.calibrate", "--model-path", str(CHAIN_TRACER), "--device", "cpu"]
    command += ["--context", "512", "--budgets", str(BUDGET), "--reads", "3", "--output", str(preset)]
    kept = (kept_calibration.FOLDER_ENV, str(preset.parent / "kept"))
    ran = subprocess.run(command, capture_output=True, text=True, env=launch_env([kept]), timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert f"--lim-preset {preset}" in ran.stdout and "the next server on this checkpoint uses it" in ran.stdout
    return preset


def test_chains_are_kept_by_what_is_chosen(calibrated: Path) -> None:
    preset = preset_file.load(str(calibrated))
    assert (preset.architecture, preset.num_layers) == ("Qwen3ForCausalLM", 12)
    (entry,) = preset.entries
    chains = entry.measured["chains"]
    assert chains["dense_right"] >= 0.8 and chains["right"] >= chains["dense_right"] - 0.2
    assert entry.measured["full_reads"] <= 3 and entry.measured["agreement"] > 0.95


@pytest.mark.parametrize("release", ["current"], indirect=True)
def test_a_server_finds_it_without_a_flag(calibrated: Path, release: str, pool: ServerPool) -> None:
    (entry,) = preset_file.load(str(calibrated)).entries
    args = (
        "--attention-backend",
        "lessismore",
        "--lim-budget",
        "80",
        "--dtype",
        "float32",
        "--max-total-tokens",
        "4096",
    )
    kept = ((kept_calibration.FOLDER_ENV, str(calibrated.parent / "kept")), *AS_USERS)
    server = pool.get(ServerSpec(f"kept-{release}", CHAIN_TRACER, args, env=kept, python=interpreter(release)))
    info = server.lessismore()
    assert info["selection_layers"] == list(entry.selection_layers)
    assert info["selection_attends"] == entry.selection_attends
    source = info["selection_layers_from"]
    assert source.startswith("the calibration kept in ") and source.endswith(f", calibrated at budget {BUDGET}")
    assert info["selection_layers_measured"]["agreement"] == entry.measured["agreement"]
    assert f"selection layers from {source}" in server.log()
    server.generate_one(list(range(112, 262)), 4)
    assert server.counters()["selections"] > 0


@pytest.mark.parametrize("release", ["current"], indirect=True)
def test_a_server_takes_the_preset(calibrated: Path, release: str, pool: ServerPool) -> None:
    content = json.loads(calibrated.read_text())
    # Layers that nothing else would choose.
    content["entries"][0] |= {"selection_layers": [0, 4], "selection_attends": "context"}
    content["rule"]["aggregate"] = "max"
    changed = calibrated.with_name("changed.json")
    changed.write_text(json.dumps(content))
    args = ("--attention-backend", "lessismore", "--lim-budget", "80", "--dtype", "float32")
    args += ("--lim-preset", str(changed), "--max-total-tokens", "4096")
    server = pool.get(ServerSpec(f"preset-{release}", CHAIN_TRACER, args, python=interpreter(release)))
    info = server.lessismore()
    assert info["selection_layers"] == [0, 4]
    assert info["selection_layers_from"] == f"--lim-preset {changed}, calibrated at budget {BUDGET}"
    assert "was calibrated with aggregate max, not union" in server.log()
