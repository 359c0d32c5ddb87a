"""Tests see no calibration of whoever runs them."""

from pathlib import Path

from sgl_lim.settings.kept_calibration import FOLDER_ENV, path_of
from support.server import launch_env


def test_servers_of_tests_find_no_calibration_of_the_developer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    folder = path_of(str(tmp_path)).parent
    assert launch_env()[FOLDER_ENV] == str(folder)
    assert list(folder.iterdir()) == [] and Path.home() not in folder.parents
