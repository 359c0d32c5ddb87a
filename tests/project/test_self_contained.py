"""Does a checkout test itself alone? No test may read, or wait for, a file that lies outside the repository."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "tests").rglob("*.py"))
ASKS_FOR_A_FILE = {"exists", "is_file", "is_dir"}
ELSEWHERE = re.compile(r"(\.\.|/(data|home|mnt|opt|root|srv|work))(/[\w./-]*)?")


def offences(text: str, path: Path) -> list[str]:
    """Where a test file that lies at `path` looks beyond the repository, one line each."""
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in sorted(_found(ast.parse(text), path))]


def _found(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="parents"), slice=ast.Constant(value=int(n))) if n >= depth:
                yield node.lineno, f"parents[{n}] is above the repository"
            case ast.Constant(value=str(text)) if ELSEWHERE.fullmatch(text):
                yield node.lineno, f"{text!r} names a path outside the repository"
            case ast.If() if _calls(node.test, ASKS_FOR_A_FILE) and any(_calls(n, {"skip"}) for n in node.body):
                yield node.lineno, "skips where a file is missing"
            case ast.Call() if _name(node.func) == "skipif" and _calls(node, ASKS_FOR_A_FILE):
                yield node.lineno, "skips where a file is missing"


def _calls(tree: ast.AST, names: set[str]) -> bool:
    return any(isinstance(node, ast.Call) and _name(node.func) in names for node in ast.walk(tree))


def _name(function: ast.expr) -> str:
    """The last part of a called name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_needs_a_file_from_elsewhere(path: Path) -> None:
    if path != Path(__file__):
        assert not offences(path.read_text(), path)


@pytest.mark.parametrize(
    "text",
    [
        "DATA = Path(__file__).parents[3] / 'shared'",
        "DATA = '../shared/data'",
        "open('/work/data.jsonl')",
        "if not path.exists():\n    pytest.skip('it is not here')",
        "@pytest.mark.skipif(not DATA.is_dir(), reason='not here')\ndef test(): ...",
    ],
)
def test_what_lies_elsewhere_is_found(text: str) -> None:
    assert len(offences(text, ROOT / "tests" / "programs" / "test_anything.py")) == 1


def test_the_repository_s_own_files_may_be_read() -> None:
    text = "MODEL = Path(__file__).parents[2] / 'models'\nif not out.exists():\n    return"
    assert not offences(text, ROOT / "tests" / "programs" / "test_anything.py")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.csv")), ids=lambda path: path.name)
def test_results_name_no_folder_of_somebody(path: Path) -> None:
    """A command in a row is to be repeated elsewhere."""
    found = re.search(r"/(data|home|mnt|opt|root|srv|work|Users)/[\w./-]*", path.read_text())
    assert found is None, f"{path.name} names {found[0]}; give benchmarks paths below the repository"


def test_results_have_one_kind_of_line() -> None:
    """Rows that are appended by another command end as those before them."""
    found = [path.name for path in (ROOT / "benchmarks/results").glob("*.csv") if b"\r" in path.read_bytes()]
    assert not found, f"carriage returns in {', '.join(found)}"
