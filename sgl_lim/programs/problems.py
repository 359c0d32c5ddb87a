"""Where problems come from: generated chains or needles, or a JSONL file of mathematical problems."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgl_lim.tasks import jsonl
from sgl_lim.tasks.chains import generate_chains
from sgl_lim.tasks.needles import generate_needles

Kind = Literal["chain", "needle", "math"]

PLACEHOLDER = "{problem}"
DEFAULT_PROMPT_TEMPLATE = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class ProblemError(ValueError):
    """A problem source cannot be used; the message names the file, the line and what to change."""


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt` is the text of the request (of its user turn with a chat template)."""

    id: str
    prompt: str
    answer: str
    kind: Kind
    solution: str | None = None  # chains only: the whole text that a right generation has


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one kind, with what identifies their source in a run's settings.

    `spec` says nothing of how many problems are asked, so that a longer run can continue a shorter one's file.
    """

    problems: tuple[Problem, ...]
    kind: Kind
    spec: Mapping[str, Any]


def chain_problems(count: int, *, num_facts: int, num_steps: int, seed: int) -> ProblemSet:
    """`count` generated chains; problem `i` depends on the sizes and `(seed, i)` only.

    Raises:
        ValueError: a size is out of `sgl_lim.tasks.chains`' range.
    """
    chains = generate_chains(count, num_facts=num_facts, num_steps=num_steps, seed=seed)
    problems = tuple(
        Problem(f"{num_facts}x{num_steps}/{seed}/{index}", chain.prompt, chain.answer, "chain", chain.solution)
        for index, chain in enumerate(chains)
    )
    return ProblemSet(problems, "chain", {"source": "chains", "facts": num_facts, "steps": num_steps, "seed": seed})


def needle_problems(count: int, *, sentences: int, keys: int, seed: int, chat: bool) -> ProblemSet:
    """`count` generated needles; problem `i` depends on the sizes and `(seed, i)` only.

    Args:
        sentences: of prose around the codes, some 14 tokens each.
        keys: things with a code, of which one is asked for.
        chat: whether a chat template says who asks; a plain text has to.

    Raises:
        ValueError: a size is out of `sgl_lim.tasks.needles`' range.
    """
    problems = []
    for index, (needle, text) in enumerate(generate_needles(count, sentences=sentences, keys=keys, seed=seed)):
        prompt = f"{text}\n\n{needle.question}" if chat else f"{text}\n\nQuestion: {needle.question}\nAnswer:"
        problems.append(Problem(f"{sentences}x{keys}/{seed}/{index}", prompt, str(needle.code), "needle"))
    spec = {"source": "needles", "sentences": sentences, "keys": keys, "seed": seed}
    return ProblemSet(tuple(problems), "needle", spec)


def jsonl_problems(path: Path, *, template: str = DEFAULT_PROMPT_TEMPLATE) -> ProblemSet:
    """Read a file of one JSON object a line: `problem`, `answer`, and optionally `id` (default: `line-N`, from 1).

    Blank lines are skipped; other keys are ignored. Every `{problem}` in `template` is replaced, and nothing else in
    it is special.

    Raises:
        ProblemError: the file cannot be read or has no problem, a line is not an object, a key is missing or of the
            wrong type, an id occurs twice, or the template has no `{problem}`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProblemError(f"{path}: {error.strerror or error}") from error
    return parse_jsonl(content, path.name, str(path), template)


def parse_jsonl(content: bytes, name: str, path: str, template: str) -> ProblemSet:
    """As `jsonl_problems`, of a file's content; errors call it `path`, and the spec `name`."""
    if PLACEHOLDER not in template:
        raise ProblemError(f"the prompt template has no {PLACEHOLDER}, so no problem would be asked: {template!r}")
    try:
        lines = jsonl.decode(content).split("\n")
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path}: not UTF-8 text (byte {error.start}); expected one JSON object a line") from error
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem = _parse_line(line, template, f"{path}:{number}", default_id=f"line-{number}")
        if problem.id in line_of_id:
            raise ProblemError(
                f"{path}:{number}: id {problem.id!r} is already used on line {line_of_id[problem.id]}; "
                "results are kept by id, so every problem needs its own"
            )
        line_of_id[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ProblemError(f"{path}: no problem in it; expected one JSON object a line with 'problem' and 'answer'")
    digest = hashlib.sha256(content).hexdigest()[:16]
    spec = {"source": "jsonl", "file": name, "sha256": digest, "template": template}
    return ProblemSet(tuple(problems), "math", spec)


def _parse_line(line: str, template: str, where: str, *, default_id: str) -> Problem:
    try:
        row = jsonl.parse_object(line)
    except ValueError as error:
        raise ProblemError(f"{where}: {error}") from error
    text = _field(row, "problem", (str,), where)
    answer = _field(row, "answer", (str, int, float), where)
    identity = _field(row, "id", (str, int), where) if "id" in row else default_id
    return Problem(identity, template.replace(PLACEHOLDER, text), answer, "math")


def _field(row: dict[str, Any], key: str, types: tuple[type, ...], where: str) -> str:
    """The value of `key` as non-empty text."""
    expected = " or ".join(kind.__name__ for kind in types)
    if key not in row:
        raise ProblemError(f"{where}: missing key {key!r} (expected {expected}); the line has {sorted(row)}")
    value = row[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ProblemError(f"{where}: {key!r} must be {expected}, got {type(value).__name__}")
    text = str(value).strip()
    if not text:
        raise ProblemError(f"{where}: {key!r} is empty")
    return text
