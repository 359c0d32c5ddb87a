"""The soak for less than two minutes: nothing is left in use, and every answer is the answer alone."""

import csv
from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = pytest.mark.served


def test_nothing_leaks_and_every_answer_is_the_answer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "soak.csv"
    sizes = ["--seconds", "45", "--jobs", "16", "--clients", "8", "--longest", "400", "--output-len", "32"]
    code = soak.main(
        ["--method", "group", *sizes, "--pool", "2048", "--logs", str(tmp_path / "logs"), "--output", str(output)]
    )
    log = (tmp_path / "logs" / "group.log").read_text(errors="replace")
    with output.open() as file:
        (row,) = csv.DictReader(file)
    assert code == 0, row
    assert [row[name] for name in ("differences", "failures", "tokens_in_use", "requests_in_use")] == ["0"] * 4
    assert int(row["compared"]) > 0 and int(row["requests"]) >= 16, row
    assert "leak" not in log.lower() and "Scheduler hit an exception" not in log
