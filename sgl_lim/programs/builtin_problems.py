"""Built-in problem sets by name (AIME, MATH-500), from a folder or from the Hugging Face hub."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, ProblemError, ProblemSet, jsonl_problems, parse_jsonl

DATA_DIR = "SGL_LIM_DATA_DIR"  # environment variable


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the hub, at a fixed revision."""

    repo: str
    path: str  # JSONL or Parquet
    revision: str
    count: int  # problems in it
    identity: str = field(default="id")  # column that tells problems apart

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"https://huggingface.co/datasets/{self.repo}/resolve/{self.revision}/{self.path}"


BUILTIN: Mapping[str, HubFile] = {
    "aime2024": HubFile(
        "HuggingFaceH4/aime_2024",
        "data/train-00000-of-00001.parquet",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        30,
    ),
    "aime2025": HubFile("math-ai/aime25", "test.jsonl", "563bb8404243c5f09de6ec262f2db674fe5bce9b", 30),
    "math500": HubFile(
        "HuggingFaceH4/MATH-500", "test.jsonl", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", 500, identity="unique_id"
    ),
}


def builtin_problems(name: str, folder: Path | None, *, template: str = DEFAULT_PROMPT_TEMPLATE) -> ProblemSet:
    """A set of `BUILTIN`: `NAME.jsonl` of `folder`, else of the folder that the environment names, else from the hub.

    A folder that lacks the file is an error: which copy was used is never a guess.

    Raises:
        ProblemError: the file is not there, cannot be fetched or read, or has another number of problems; the
            message says what to download and where to put it.
    """
    where = "--data-dir"
    if folder is None and os.environ.get(DATA_DIR):
        folder, where = Path(os.environ[DATA_DIR]), f"${DATA_DIR}"
    if folder is None:
        found = parse_jsonl(_from_hub(name), name, f"{name} of the hub", template)
    elif (folder / f"{name}.jsonl").is_file():
        found = jsonl_problems(folder / f"{name}.jsonl", template=template)
    else:
        raise ProblemError(f"{where} {folder}: has no {name}.jsonl; {_by_hand(name)}, or let the hub be asked for it")
    if len(found.problems) != BUILTIN[name].count:
        raise ProblemError(
            f"{name}: expected {BUILTIN[name].count} problems, got {len(found.problems)}; correct the file, or give it "
            "as --problems FILE if it is another selection"
        )
    return found


def _from_hub(name: str) -> bytes:
    """The set as JSONL with `id`, `problem` and `answer`."""
    source = BUILTIN[name]
    try:
        rows = _rows(Path(_download(source)))
    except Exception as error:  # the client's errors, of which there are many, and those of a broken file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ProblemError(
            f"--problems {name}: {source.repo} could not be loaded from the hub ({reason}); {_by_hand(name)} and name "
            f"its folder with --data-dir or ${DATA_DIR}"
        ) from error
    columns = {"id": source.identity, "problem": "problem", "answer": "answer"}
    lines = [{key: row[column] for key, column in columns.items() if column in row} for row in rows]
    return "\n".join(map(json.dumps, lines)).encode()


def _download(source: HubFile) -> str:
    """The path of the file in the hub's cache, fetched if it is not there."""
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(source.repo, source.path, repo_type="dataset", revision=source.revision))


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet  # with the datasets library, which SGLang requires

        return list(parquet.read_table(path).to_pylist())
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def _by_hand(name: str) -> str:
    source = BUILTIN[name]
    return f"download {source.url} and save it as {name}.jsonl (one object a line with 'id', 'problem', 'answer')"
