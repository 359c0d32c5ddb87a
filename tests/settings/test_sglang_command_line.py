"""What SGLang's own parser makes of our flags: in the YAML of `--config`, and by `sglang serve`. No server starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "chain-tracer"
# The launcher with its last step taken out: what would be served is printed.
PARSE_ONLY = """
import os, sys
import sglang.launch_server as launcher
launcher.run_server = lambda args: print("served:", args.attention_backend, os.environ.get("LESSISMORE_CONFIG", "{}"))
from sglang.cli.main import main
main()
"""


def parsed(folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "LESSISMORE_CONFIG"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    code = [sys.executable, "-c", PARSE_ONLY]
    return subprocess.run([*code, "serve", *argv], cwd=folder, env=environment, capture_output=True, text=True)


def served(folder: Path, *argv: str) -> dict[str, object]:
    ended = parsed(folder, *argv)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("served: lessismore ")]
    assert lines, ended.stderr[-2000:]
    found: dict[str, object] = json.loads(lines[0].removeprefix("served: lessismore "))
    return found


def test_sglang_serve_takes_flags_and_a_yaml_list(tmp_path: Path) -> None:
    """The command line wins over the file, as with SGLang's own flags."""
    lines = ["device: cpu", "attention-backend: lessismore", "lim-selection-layers: [2, 8]", "lim-budget: 256"]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "lim-early-sets: on"]))
    found = served(tmp_path, str(MODEL), "--config", "config.yaml", "--lim-budget", "128")
    assert found == {"selection_layers": [2, 8], "budget": 128, "early_sets": True}


def test_a_list_that_is_none_is_refused_by_the_flag(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lim-selection-layers: [2, x]\n")
    ended = parsed(tmp_path, "--model-path", str(MODEL), "--config", "config.yaml")
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "argument --lim-selection-layers: expected layer indices separated by commas" in ended.stderr
    assert "got '2,x'" in ended.stderr
