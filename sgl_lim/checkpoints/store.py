"""Where checkpoints are kept, and how one comes to be there: whole, once, whoever asks at the same time."""

import errno
import fcntl
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgl_lim.checkpoints.catalogue import CATALOGUE, Checkpoint, CheckpointError
from sgl_lim.checkpoints.download import Say, check_space, fetch_gguf
from sgl_lim.user_cache import cache_folder

RECIPE = 1
"""Counts the ways in which files were converted. A cached folder that was made in another way is made anew."""
MARK = "sgl_lim_checkpoint.json"


def ensure(name: str, folder: Path | None = None, *, say: Say | None = None) -> Path:
    """The folder of a checkpoint in Hugging Face form: from the cache, or else downloaded and converted.

    Args:
        name: one of `CATALOGUE`.
        folder: where it shall lie, if not in the cache.
        say: is given a line of progress now and then; by default they go to stderr.

    Raises:
        Unreachable: it is not cached, and the package index did not answer.
        CheckpointError: anything else; the message says what to do.
    """
    if name not in CATALOGUE:
        raise CheckpointError(f"there is no checkpoint {name!r}; there are {', '.join(CATALOGUE)}")
    return bring(CATALOGUE[name], folder or default_folder(name), say or _to_stderr)


def default_folder(name: str) -> Path:
    """Where a checkpoint lies in the user's cache."""
    return cache_folder("checkpoints") / name


def bring(checkpoint: Checkpoint, folder: Path, say: Say) -> Path:
    """`ensure` for any checkpoint. Beside the folder lie its lock and, until it is made, `<folder>.part`."""
    folder = folder.absolute()
    if _is_made(checkpoint, folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_beside(folder, ".lock"), say):
            if not _is_made(checkpoint, folder):
                _make(checkpoint, folder, say)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left on the disk of {folder}: free some, or choose another disk with --folder"
        else:
            message = f"{folder}: {error}; choose another place with --folder"
        raise CheckpointError(message) from error
    return folder


def _is_made(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether the folder holds this checkpoint as it is made today; refuses a folder that holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        mark = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        mark = {}
    if mark.get("name") != checkpoint.name:
        what = f"the checkpoint {mark['name']}" if "name" in mark else "something else"
        raise CheckpointError(f"{folder} holds {what}: name a folder that does not exist, or move that one away")
    return mark == _mark(checkpoint)


def _mark(checkpoint: Checkpoint) -> dict[str, str | int]:
    """What the folder says of itself."""
    return {"name": checkpoint.name, "sha256": checkpoint.sha256, "recipe": RECIPE, "licence": checkpoint.licence}


def _make(checkpoint: Checkpoint, folder: Path, say: Say) -> None:
    """Download, convert, and put the result in its place in one step."""
    from sgl_lim.checkpoints.convert import convert

    say(f"{checkpoint.title}: {checkpoint.download_mb} MB to download, licence {checkpoint.licence}")
    work = _beside(folder, ".part")
    work.mkdir(exist_ok=True)
    if not (work / "model.gguf").exists():
        check_space(checkpoint, work)
    for left in [*work.glob("download.*"), *work.glob("converted.*")]:  # by a process that was killed
        shutil.rmtree(left)
    gguf = fetch_gguf(checkpoint, work, say)
    with tempfile.TemporaryDirectory(dir=work, prefix="converted.") as made:
        converted = Path(made) / folder.name
        converted.mkdir()
        convert(gguf, converted, say)
        (converted / MARK).write_text(json.dumps(_mark(checkpoint), indent=2) + "\n")
        if folder.exists():  # made by an earlier recipe
            shutil.rmtree(folder)
        converted.rename(folder)
    shutil.rmtree(work)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Only one process at a time; the kernel frees the lock of a process that dies."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making it; waiting for that one")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
