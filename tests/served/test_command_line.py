"""The launcher's command line: the plugin's flags are shown, and values that cannot be parsed are refused at once."""

import re
from pathlib import Path

import pytest

from support.fleet import Fleet
from support.server import run_launcher

pytestmark = pytest.mark.served

FLAGS = ("method", "budget", "recency", "sinks", "selection-layers", "aggregate", "dense-backend", "preset")
REFUSED = {
    "fractional-budget": (("--lim-budget", "1.5"), r"argument --lim-budget: invalid int value: '1\.5'"),
    "layers-that-are-no-numbers": (
        ("--lim-selection-layers", "2,x"),
        r"argument --lim-selection-layers: expected layer indices separated by commas, got '2,x'",
    ),
}


def test_help_shows_the_flags(tmp_path: Path) -> None:
    shown = run_launcher(["--help"], cwd=tmp_path)
    assert shown.code == 0
    for flag in FLAGS:
        assert f"--lim-{flag} " in shown.out
    assert "lessismore" in shown.out


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_be_parsed_are_refused(fleet: Fleet, tmp_path: Path, name: str) -> None:
    args, message = REFUSED[name]
    outcome = run_launcher(["--model-path", str(fleet.model("gqa")), *args], cwd=tmp_path)
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err[-2000:]
