"""Finding a folder of gates, and reading what it says."""

import json
from functools import lru_cache
from pathlib import Path

from sgl_lim.gates.config import GateConfig, GateError

CONFIG = "config.json"
PICKLED = "attn_gate_weights.pth"
"""As the authors publish the weights."""
PLAIN = "attn_gate_weights.safetensors"
_EXPECTED = f"a folder with {CONFIG} and {PICKLED} (or {PLAIN})"


def find(path: str) -> Path:
    """The folder of a path, or of a name on the hub, which is downloaded unless the local cache has it.

    Raises:
        GateError: there is none, or it lacks a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise GateError(f"{path}: is a file; give {_EXPECTED}")
        downloaded = _from_hub(path)
        if isinstance(downloaded, str):
            raise GateError(f"{path}: neither a folder nor to be had from the hub ({downloaded}); give {_EXPECTED}")
        folder = downloaded
    if not (folder / CONFIG).is_file():
        raise GateError(f"{path}: has no {CONFIG}; give {_EXPECTED}")
    weights_file(folder)
    return folder


def weights_file(folder: Path) -> Path:
    """The file of weights; safetensors win over a pickle. Raises GateError."""
    for name in (PLAIN, PICKLED):
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise GateError(f"{folder}: has neither {PICKLED} nor {PLAIN}; give {_EXPECTED}")


def read_config(path: str) -> GateConfig:
    """What the gates of a path or a name on the hub say of themselves. Raises GateError."""
    folder = find(path)
    return _read(folder, (folder / CONFIG).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(folder: Path, changed: int) -> GateConfig:
    """Of a file that changed last at some time, so that another one in its place is read anew."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise GateError(f"{folder / CONFIG}: cannot be read ({error}); download it again") from error
    if not isinstance(values, dict):
        raise GateError(f"{folder / CONFIG}: expected a JSON object, got {type(values).__name__}")
    return GateConfig.of(values)


@lru_cache(maxsize=8)
def _from_hub(name: str) -> Path | str:
    """The folder, or why there is none; a process asks once."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, PICKLED, "*.safetensors"]))
    # No name of the hub's; not there; no network, and not in the cache.
    except (ValueError, OSError) as error:
        return str(error).strip().splitlines()[0]
