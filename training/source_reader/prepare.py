"""Turn installed packages into token arrays, in parallel; draw chain rows.

A data folder holds `train.npy` and `held_out.npy` (uint16: files one after another, each under a title and before an
`<eos>`), `chains-L.npy` and `wanted-L.npy` for rows of L tokens and the next one, and `data.json` about them.
"""

import hashlib
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .chains import ChainWriter
from .corpus import HELD_OUT, Source, find_sources, fingerprint, package_folders, read_text, titled
from .tokenizer import EOS, FILE, load_tokenizer

Tokens = NDArray[np.uint16]
_tokenizer: Tokenizer  # of a worker process


@dataclass(frozen=True)
class Encoded:
    """One file's tokens, `<eos>` included."""

    source: Source
    mark: bytes
    tokens: Tokens


def prepare(folder: Path, roots: Iterable[Path], *, processes: int, limit: int | None = None) -> dict[str, object]:
    """Write train.npy, held_out.npy and data.json unless they are there.

    Args:
        roots: folders that packages are installed in.
        limit: train on this many files only, spread over all.

    Returns:
        What data.json says: tokens of each part, packages, and the arrays' sha256.
    """
    description = folder / "data.json"
    if description.exists():
        return dict(json.loads(description.read_text()))
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    sources = find_sources(roots)
    if limit is not None:
        sources = [sources[i] for i in sorted(random.Random(0).sample(range(len(sources)), min(limit, len(sources))))]
    train, held_out = split(encode_all(sources, processes))
    content: dict[str, object] = {}
    for name, files in (("train", train), ("held_out", held_out)):
        if not files:
            raise ValueError(f"no {name} text under {', '.join(map(str, roots))}; held out are {', '.join(HELD_OUT)}")
        tokens = np.concatenate([f.tokens for f in files])
        np.save(folder / f"{name}.npy", tokens)
        packages: Counter[str] = Counter()
        for file in files:
            packages[file.source.name.split("/")[0]] += len(file.tokens)
        content[name] = {
            "tokens": len(tokens),
            "files": len(files),
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()[:12],
            "packages": dict(packages.most_common()),
        }
    content["tokenizer_sha256"] = hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]
    content["seconds"] = round(time.monotonic() - begin, 1)
    description.write_text(json.dumps(content, indent=2) + "\n")
    return content


def held_out_tokens(folder: Path | None) -> Tokens:
    """The held-out text of a data folder, or without one that of this interpreter's packages, encoded now."""
    if folder is not None:
        return np.asarray(np.load(folder / "held_out.npy"))
    sources = [s for s in find_sources(package_folders()) if s.held_out]
    _, held_out = split(encode_all(sources, len(os.sched_getaffinity(0))))
    return np.concatenate([f.tokens for f in held_out])


def split(files: Iterable[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Training and held-out files, each text once; a text that is held out anywhere is trained on nowhere."""
    everything = list(files)
    held_out: dict[bytes, Encoded] = {}
    train: dict[bytes, Encoded] = {}
    for file in everything:
        if file.source.held_out:
            held_out.setdefault(file.mark, file)
    for file in everything:
        if file.mark not in held_out:
            train.setdefault(file.mark, file)
    return list(train.values()), list(held_out.values())


def encode_all(sources: list[Source], processes: int) -> list[Encoded]:
    """Files worth reading, encoded, in the order of `sources`."""
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker) as pool:
        return [e for e in pool.imap(_encode, sources, chunksize=32) if e is not None]


def _start_worker() -> None:
    global _tokenizer
    _tokenizer = load_tokenizer()


def _encode(source: Source) -> Encoded | None:
    text = read_text(source.file)
    if text is None:
        return None
    ids = _tokenizer.encode(titled(source, text), add_special_tokens=False).ids
    return Encoded(source, fingerprint(text), np.array([*ids, EOS], dtype=np.uint16))


def prepare_chains(folder: Path, length: int, count: int, *, seed: int, processes: int) -> None:
    """Write `count` chain rows for inputs of `length` tokens unless they are there; row i depends on (seed, i)."""
    files = folder / f"chains-{length}.npy", folder / f"wanted-{length}.npy"
    if all(f.exists() for f in files):
        return
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker) as pool:
        draw = partial(_chain_rows, folder=folder, length=length, seed=seed)
        parts = pool.map(draw, [range(i, min(count, i + 64)) for i in range(0, count, 64)])
    for file, rows in zip(files, zip(*parts, strict=True), strict=True):
        np.save(file, np.concatenate(rows))


def _chain_rows(rows: range, *, folder: Path, length: int, seed: int) -> tuple[Tokens, NDArray[np.bool_]]:
    writer = ChainWriter(_tokenizer, np.load(folder / "train.npy", mmap_mode="r"))
    drawn = [writer.row(random.Random(f"{seed}/{length}/{i}"), length + 1) for i in rows]
    return np.stack([tokens for tokens, _ in drawn]), np.stack([wanted for _, wanted in drawn])
