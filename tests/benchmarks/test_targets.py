"""Servers that benchmarks start: what decides their layers."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks import targets
from sgl_lim.settings.kept_calibration import FOLDER_ENV


@pytest.fixture
def started(monkeypatch):
    """What servers would have been started."""
    found = []

    @contextmanager
    def running_server(launch, *, timeout):
        found.append(launch)
        yield SimpleNamespace(url="http://some")

    monkeypatch.setattr(targets, "running_server", running_server)
    return found


def test_what_was_calibrated_here_decides_no_layers(started, monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER_ENV)
    with targets.endpoint(targets.Target("lim", arguments=("--attention-backend", "lessismore")), tmp_path, 1) as url:
        assert url == "http://some"
    environment = started[0].environment
    assert environment == {**os.environ, FOLDER_ENV: str(tmp_path / "calibrations")}
    assert not (tmp_path / "calibrations").exists()


def test_a_folder_that_is_named_is_taken(started, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER_ENV, "/somewhere")
    with targets.endpoint(targets.Target("lim"), tmp_path, 1):
        assert started[0].environment[FOLDER_ENV] == "/somewhere"
