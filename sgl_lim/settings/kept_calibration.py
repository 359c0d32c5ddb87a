"""Calibration results by checkpoint in the user's cache, so that a later start finds them without a flag."""

import dataclasses
import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.settings import preset_file
from sgl_lim.settings.fingerprint import NoCheckpoint, fingerprint
from sgl_lim.settings.preset_file import PresetError, PresetFile
from sgl_lim.user_cache import cache_folder

FOLDER_ENV = "LESSISMORE_CALIBRATIONS"
"""The folder of kept results, where it shall be another than `calibrations` in the cache."""
KEPT_ON = "kept_on"


@dataclass(frozen=True)
class Kept:
    """A result and where it lies."""

    preset: PresetFile
    path: Path

    @property
    def kept_on(self) -> str | None:
        """The day, as 2026-01-31."""
        day = self.preset.calibration.get(KEPT_ON)
        return day if isinstance(day, str) else None


def path_of(model_path: str, revision: str | None = None) -> Path:
    """The file of a checkpoint's result, whether or not there is one.

    Raises:
        NoCheckpoint: as `fingerprint`.
        OSError: as `fingerprint`, or the user has no home folder.
    """
    named = os.environ.get(FOLDER_ENV)
    folder = Path(named).expanduser() if named else cache_folder("calibrations")
    return folder / f"{fingerprint(model_path, revision)}.json"


def keep(preset: PresetFile, model_path: str, revision: str | None = None) -> Path:
    """Keep a result with today's date, in place of the checkpoint's earlier one; returns its file.

    Raises:
        NoCheckpoint, OSError: as `path_of`, or the folder cannot be written.
    """
    path = path_of(model_path, revision)
    path.parent.mkdir(parents=True, exist_ok=True)
    dated = {**preset.calibration, KEPT_ON: datetime.date.today().isoformat()}
    dataclasses.replace(preset, calibration=dated).write(path)
    return path


def find(model_path: str, num_layers: int, revision: str | None = None) -> Kept | None:
    """The result that was kept for a checkpoint; None if there is none, or the checkpoint is not there to be looked at.

    Args:
        num_layers: the model's depth as it is served.

    Raises:
        PresetError: there is a file, and it is no preset of a model of this depth; the message says what to do.
    """
    try:
        path = path_of(model_path, revision)
        if not path.exists():
            return None
    except (NoCheckpoint, OSError):
        return None
    try:
        preset = preset_file.load(str(path))
        if preset.num_layers != num_layers:
            raise PresetError(f"{path}: made for {preset.num_layers} layers, and this model has {num_layers}")
    except PresetError as error:
        raise PresetError(f"{error}; or delete the file") from error
    return Kept(preset, path)
