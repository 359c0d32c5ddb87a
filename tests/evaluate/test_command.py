"""Does the command run on a checkpoint as a user has it, and refuse what it cannot measure?"""

import csv
from pathlib import Path

import pytest

from sgl_lim.evaluate import cli
from sgl_lim.evaluate.cli import main
from support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), layers=4, hidden=64, heads=4, head_dim=16)


def test_chains_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "chains.csv"
    command = ["--model-path", str(folder), "--tasks", "chains", "--context", "300", "--items", "2", "--steps", "3"]
    command += ["--methods", "lessismore:aggregate=max,quest", "--budgets", "32,64", "--selection", "1"]
    assert main([*command, "--selection", "1,2", "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    asked = [(row["method"], row["budget"], row["selection_layers"]) for row in rows]
    lessismore = [("lessismore:aggregate=max", budget, layers) for layers in ("1", "1-2") for budget in ("32", "64")]
    assert asked == [("full", "", ""), *lessismore, ("quest", "32", ""), ("quest", "64", "")]
    assert all(row["model"] == folder.name and row["dtype"] == "float32" and row["context"] == "300" for row in rows)
    assert float(rows[0]["attended_fraction"]) == 1 > float(rows[2]["attended_fraction"]) > 0.5
    found = capsys.readouterr()
    assert found.out.splitlines()[0].split() == ["method", "layers", "budget", "read", "chains"]
    assert found.out.splitlines()[-1].startswith("Nothing can be said: full attention itself")
    assert "7 choices on chains" in found.err
    assert main([*command, "--selection", "1,2", "--output", str(tmp_path / "again.csv")]) == 0
    with (tmp_path / "again.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [{**row, "seconds": ""} for row in again] == [{**row, "seconds": ""} for row in rows]


def test_text_and_needles_on_the_source_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, output = tmp_path / "own.txt", tmp_path / "text.csv"
    own.write_text("def total(values):\n    return sum(values)\n\n" * 60)
    command = ["--model-path", str(ROOT / "models" / "source-reader"), "--tasks", "text,needles", "--text", str(own)]
    command += ["--context", "400", "--items", "1", "--decoded", "16", "--methods", "window", "--output", str(output)]
    assert main(command) == 0
    with output.open() as file:
        rows = {(row["suite"], row["method"]): row for row in csv.DictReader(file)}
    assert len(rows) == 10 and {name for name, _ in rows} == {"english", "python", "own", "needle", "four_keys"}
    assert rows["own", "window"]["budget"] == "48" and rows["own", "window"]["selection_layers"] == "1-5-8"
    full, sparse = rows["own", "full"], rows["own", "window"]
    assert full["agreement"] == full["overlap"] == "1.0000" and float(full["perplexity"]) < 1.5
    assert float(sparse["overlap"]) < 1 and float(sparse["attended"]) == pytest.approx(48 / 392, abs=0.01)
    assert rows["needle", "full"]["whole_at_10"] != "" == rows["needle", "full"]["whole_at_90"]


def test_what_was_done_is_kept_after_ctrl_c(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", stopped)
    output = tmp_path / "out.csv"
    command = ["--model-path", str(folder), "--tasks", "chains", "--context", "300", "--items", "1"]
    assert main([*command, "--output", str(output)]) == 130
    assert f"stopped; {output} has the rows that were done" in capsys.readouterr().err and output.exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tasks", "needles"], "the tokenizer lacks words of needle; leave needles out of --tasks"),
        (["--context", "5000"], "--context 5000: the model has positions for 4096 tokens"),
        (["--selection", "1,9"], "--selection 1,9: the model has the layers 0 to 3"),
        (["--methods", "quest", "--budgets", "33"], "--lim-budget 33: --lim-method quest chooses pages of 16"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--output", "/dev/null/out.csv"], "--output /dev/null/out.csv: "),
        (["--model-path", "no/such/model"], "--model-path no/such/model"),
    ],
)
def test_refusals_name_the_flag(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    command = ["--model-path", str(folder), "--tasks", "chains", "--context", "300", "--items", "1"]
    assert main([*command, "--output", str(tmp_path / "out.csv"), *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tasks", "text,maths"], "argument --tasks: there are text, needles, chains, got maths"),
        (["--decoded", "4096"], "argument --decoded: must be below --context 4096"),
        (["--selection", "6,2"], "argument --selection: must increase, got 6,2"),
        (["--output", "out.json"], "argument --output: must end in .csv"),
        (["--tasks", "chains", "--text", "x"], "argument --text: only with text in --tasks"),
    ],
)
def test_command_lines_that_make_no_sense(capsys: pytest.CaptureFixture[str], flags: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model-path", "m", *flags])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
