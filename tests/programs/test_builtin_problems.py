"""Problem sets by name: a folder, the environment, a hub that is a stub."""

import json
from pathlib import Path
from typing import Any

import pytest

from sgl_lim.programs import builtin_problems as module
from sgl_lim.programs.builtin_problems import BUILTIN, DATA_DIR, HubFile, builtin_problems
from sgl_lim.programs.cli import main
from sgl_lim.programs.problems import ProblemError

TEMPLATE = "{problem}"


def lines(count: int, **more: Any) -> str:
    return "\n".join(
        json.dumps({"id": str(n), "problem": f"{n}+1?", "answer": str(n + 1), **more}) for n in range(count)
    )


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_DIR, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "aime2024.jsonl").write_text(lines(30))
    return tmp_path


def test_a_folder_holds_a_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtin_problems("aime2024", folder, template=TEMPLATE)
    assert len(found.problems) == 30 and found.problems[3].prompt == "3+1?" and found.spec["file"] == "aime2024.jsonl"
    monkeypatch.setenv(DATA_DIR, str(folder))
    assert builtin_problems("aime2024", None, template=TEMPLATE) == found


def test_a_folder_without_it_is_no_reason_to_go_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemError, match=r"--data-dir .* has no math500\.jsonl; download https://.*MATH-500"):
        builtin_problems("math500", folder, template=TEMPLATE)
    monkeypatch.setenv(DATA_DIR, str(folder))
    with pytest.raises(ProblemError, match=rf"\${DATA_DIR} .* has no aime2025\.jsonl"):
        builtin_problems("aime2025", None, template=TEMPLATE)


def test_another_number_of_problems_is_another_set(folder: Path) -> None:
    (folder / "aime2024.jsonl").write_text(lines(29))
    with pytest.raises(ProblemError, match="expected 30 problems, got 29"):
        builtin_problems("aime2024", folder, template=TEMPLATE)


@pytest.mark.parametrize("name", list(BUILTIN))
def test_the_hub_is_asked_for_one_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubFile] = []
    source = BUILTIN[name]
    rows = [
        {source.identity: f"x/{n}", "problem": "1+1?", "answer": "2", "solution": "Two."} for n in range(source.count)
    ]

    def download(file: HubFile) -> str:
        asked.append(file)
        path = tmp_path / Path(file.path).name
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    monkeypatch.setattr(module, "_download", download)
    found = builtin_problems(name, None, template=TEMPLATE)
    assert asked == [source]
    assert [problem.id for problem in found.problems] == [f"x/{n}" for n in range(source.count)]
    assert found.problems[0].answer == "2" and found.spec["file"] == name


def test_without_a_hub_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(file: HubFile) -> str:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(module, "_download", offline)
    assert main(["--problems", "aime2025", "--output", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert "--problems aime2025: math-ai/aime25 could not be loaded from the hub (no network)" in err
    assert "test.jsonl and save it as aime2025.jsonl" in err and "--data-dir" in err and "long story" not in err


def test_a_name_that_is_none_is_told_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--problems", "aime24", "--output", str(tmp_path / "o")]) == 2
    assert "no such file, and no set of that name; there are aime2024, aime2025, math500" in capsys.readouterr().err
