"""Which checkpoint a folder or file holds, told from little of its content.

Two checkpoints of one shape differ in their weights, so weights have to be looked at. Reading all of 140 GB would take
minutes; about a thousand blocks of 4 KiB take no time, and training changes nearly all of them. What trains a few small
tensors alone, as norms, may go unnoticed.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""As SGLang, the first kind that a folder has."""
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scheduler.pt", "optimizer.pt", "rng_state.pth")
_BLOCK = 4096
_BLOCKS = 1024  # of a checkpoint, unless it has so many files that each gets the fewest
_FEWEST = 16  # of a file
_LONGEST_HEADER = 1 << 24
_FORM = "sgl-lim-fingerprint/1"


class NoCheckpoint(ValueError):
    """There is nothing that a fingerprint could be taken of; the message says what is missing."""


def fingerprint(model_path: str, revision: str | None = None) -> str:
    """Sixty-four hexadecimal digits, the same wherever the checkpoint lies.

    They depend on the folder's `config.json` and, for each file of weights, on its name, size, safetensors header and
    evenly spaced blocks.

    Args:
        model_path: a folder in Hugging Face form, one file of weights, or a name on the hub that is in the local cache.
        revision: of the name on the hub.

    Raises:
        NoCheckpoint: no such folder or file, or no weights in it.
        OSError: it cannot be read.
    """
    path = local_path(model_path, revision)
    files = [path] if path.is_file() else [path / "config.json", *_weights(path)]
    stats = [file.stat() for file in files]
    # Within a process the files are read once; ones that came or changed since are others.
    return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


def local_path(model_path: str, revision: str | None = None) -> Path:
    """The folder or file of a model; of a name on the hub its snapshot in the local cache. Never asks the network.

    Raises:
        NoCheckpoint: there is none.
    """
    path = Path(model_path).expanduser()
    if path.exists():
        return path.resolve() if path.is_dir() else path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
    except (ValueError, OSError) as error:  # no name of the hub's; not in the cache
        raise NoCheckpoint(f"{model_path}: neither a folder, nor a file, nor in the hub's local cache") from error


def _weights(folder: Path) -> list[Path]:
    for pattern in WEIGHTS:
        found = sorted(file for file in folder.glob(pattern) if file.name not in _NO_WEIGHTS)
        if found:
            return found
    raise NoCheckpoint(f"{folder}: no weights; expected {', '.join(WEIGHTS)}")


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their sizes and times of change."""
    digest = hashlib.sha256(_FORM.encode())
    blocks = max(_FEWEST, _BLOCKS // len(files))
    for file, size, _ in files:
        if file.name == "config.json":
            content = [file.read_bytes()]
        else:
            content = [file.name.encode(), str(size).encode(), *_samples(file, size, blocks)]
        for part in content:
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _samples(path: Path, size: int, blocks: int) -> list[bytes]:
    """The header of a safetensors file, and evenly spaced blocks from the first to the last; of a small file, all."""
    with path.open("rb") as file:
        if size <= blocks * _BLOCK:
            return [file.read()]
        found = []
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            found.append(file.read(min(length, _LONGEST_HEADER)))
        for index in range(blocks):
            file.seek(index * (size - _BLOCK) // (blocks - 1))
            found.append(file.read(_BLOCK))
        return found
