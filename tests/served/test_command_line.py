"""The launcher's command line: the plugin's flags are shown, and values that cannot be parsed are refused at once."""

import argparse
from pathlib import Path

import pytest

from sgl_lim.settings.flags import add_flags
from support.fleet import Fleet
from support.server import run_launcher

pytestmark = pytest.mark.served


def test_help_shows_the_flags(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    shown = run_launcher(["--help"], cwd=tmp_path)
    assert shown.code == 0
    assert set(parser._option_string_actions) <= set(shown.out.split())
    assert "lessismore" in shown.out


def test_values_that_cannot_be_parsed_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    """The other messages of the parser are in tests/settings."""
    outcome = run_launcher(["--model-path", str(fleet.model("gqa")), "--lim-selection-layers", "2,x"], cwd=tmp_path)
    assert outcome.code == 2
    message = "argument --lim-selection-layers: expected layer indices separated by commas, or default, got '2,x'"
    assert message in outcome.err, outcome.err[-2000:]
