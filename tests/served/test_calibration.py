"""Calibration through a real engine, and a server that takes the preset."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from sgl_lim.calibrate.search import best_layers
from sgl_lim.settings import preset_file
from support.fleet import LAYERS, NEXT_PYTHON, Fleet, interpreter, random_prompt
from support.server import ServerPool, ServerSpec, launch_env

pytestmark = pytest.mark.served

BUDGETS, PROMPTS, NEW_TOKENS = (24, 96, 2048), 3, 12


@pytest.fixture(scope="module", params=["current", "next"])
def release(request: pytest.FixtureRequest) -> str:
    """A SGLang release."""
    import os

    if request.param == "next" and not os.environ.get(NEXT_PYTHON):
        pytest.skip(f"{NEXT_PYTHON} does not name the Python of an environment with the next SGLang release")
    return request.param


@pytest.fixture(scope="module")
def calibrated(release: str, fleet: Fleet, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset that the command writes."""
    pool.close()
    folder = tmp_path_factory.mktemp("calibrated")
    preset = folder / "out" / "preset.json"
    command = [interpreter(release), "-m", "sgl_lim.calibrate", "--model-path", str(fleet.model("gqa"))]
    command += ["--device", "cpu", "--dtype", "float32", "--chains", str(PROMPTS), "--facts", "30", "--steps", "2"]
    command += ["--max-tokens", str(NEW_TOKENS), "--concurrency", "2", "--output", str(preset), "--selections", "2"]
    command += ["--budgets", *map(str, BUDGETS), "--lim-aggregate", "max"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=launch_env(), timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert f"{PROMPTS}/{PROMPTS} prompts" in ran.stderr
    assert "no data for budget 2048" in ran.stdout and f"--lim-preset {preset}" in ran.stdout
    drawn = preset.with_suffix(".png")
    assert drawn.stat().st_size > 10_000 if drawn.exists() else "no heat map: matplotlib is not installed" in ran.stderr
    return preset


def test_the_preset_is_the_best_of_what_was_recorded(calibrated: Path) -> None:
    preset = preset_file.load(str(calibrated))
    assert (preset.architecture, preset.num_layers) == ("Qwen3ForCausalLM", LAYERS)
    assert preset.rule["aggregate"] == "max" and preset.rule["method"] == "lessismore"
    assert [entry.budget for entry in preset.entries] == [24, 96]
    rows = list(csv.DictReader(calibrated.with_suffix(".csv").open()))
    assert len(rows) == 2 * LAYERS * (LAYERS + 1) // 2
    for entry in preset.entries:
        # Every prompt is longer than either budget, and prefill makes a generation's first token.
        assert entry.measured["rows"] == preset.calibration["generated_tokens"] - PROMPTS > PROMPTS
        recall = [[0.0] * LAYERS for _ in range(LAYERS)]
        for row in rows:
            if row["budget"] == str(entry.budget):
                assert 0.0 < float(row["coverage"]) <= 1.0 and int(row["rows"]) == entry.measured["rows"]
                recall[int(row["chosen_at"])][int(row["read_at"])] = float(row["coverage"])
        best = best_layers(recall, selections=2, max_dense=2)
        assert entry.selection_layers == best.selection_layers
        assert entry.measured["coverage"] == pytest.approx(best.coverage, abs=1e-5)
        assert entry.measured["weighted_coverage"] == pytest.approx(best.weighted_coverage, abs=1e-5)
    # A larger set of the same layer holds more of its attention.
    own = [
        [float(row["coverage"]) for row in rows if row["budget"] == b and row["chosen_at"] == "0"] for b in ("24", "96")
    ]
    assert all(small < large for small, large in zip(*own, strict=True))


@pytest.mark.parametrize("release", ["current"], indirect=True)
def test_a_server_takes_the_preset(calibrated: Path, release: str, fleet: Fleet, pool: ServerPool) -> None:
    content = json.loads(calibrated.read_text())
    # Layers that nothing else would choose.
    content["entries"][1]["selection_layers"] = [0, 4]
    changed = calibrated.with_name("changed.json")
    changed.write_text(json.dumps(content))
    args = ("--attention-backend", "lessismore", "--lim-budget", "80", "--dtype", "float32")
    args += ("--lim-preset", str(changed), "--max-total-tokens", "4096")
    server = pool.get(ServerSpec(f"preset-{release}", fleet.model("gqa"), args, python=interpreter(release)))
    info = server.lessismore()
    assert info["selection_layers"] == [0, 4]
    assert info["selection_layers_from"] == f"--lim-preset {changed}, calibrated at budget 96"
    assert info["layer_roles"] == ["select", "sparse", "sparse", "sparse", "select", "sparse"]
    assert "recording" not in info
    log = server.log()
    assert "selection layers 0,4" in log
    assert f"selection layers from --lim-preset {changed}, calibrated at budget 96" in log
    assert "was calibrated with aggregate max, not union" in log
    server.generate_one(random_prompt(150, 1), 4)
    assert server.counters()["selections"] > 0
