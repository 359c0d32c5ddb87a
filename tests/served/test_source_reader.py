"""The second model from the command line: its preset is found, and it ends its chains as it does densely."""

import json
from pathlib import Path
from typing import Any

import pytest

from sgl_lim.programs.cli import main
from sgl_lim.programs.endpoint import server_info
from support.server import ServerPool, ServerSpec

pytestmark = pytest.mark.served

SOURCE_READER = Path(__file__).parents[2] / "models" / "source-reader"
ARGS = ("--attention-backend", "lessismore", "--lim-budget", "128", "--dtype", "float32")
POOL = ("--max-total-tokens", "8192", "--max-running-requests", "8")


@pytest.fixture(scope="module")
def url(pool: ServerPool) -> str:
    return pool.get(ServerSpec("source-reader", SOURCE_READER, (*ARGS, *POOL))).url


def test_its_chains_end(url: str, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    sizes = ["--chains", "4", "--facts", "64", "--steps", "12", "--output", str(tmp_path / "out.jsonl")]
    assert main(["--endpoint", url, *sizes, "--summary", str(summary)]) == 0
    found: dict[str, Any] = json.loads(summary.read_text())
    assert found["correct"] == 4 and found["samples_cut_off"] == 0
    assert found["attended_fraction"] < 0.5


def test_its_preset_is_found(url: str) -> None:
    lessismore = server_info(url)["internal_states"][0]["lessismore"]
    assert lessismore["selection_layers"] == [1, 5, 8]
    assert lessismore["selection_layers_from"] == "preset source-reader"
