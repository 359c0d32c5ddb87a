"""The output file: resume, torn lines, foreign content, mixed settings, locks."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sgl_lim.programs.run_records import RecordError, RecordFile, Row, describe_differences


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out.jsonl"


def test_rows_come_back_as_they_were(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    rows = [make_row("a", tokens=(3, 5)), make_row("b", error="HTTP 500: \ud800 broken"), make_row("c", correct=False)]
    with RecordFile(path, settings) as records:
        for row in rows:
            records.append(row)
    with RecordFile(path, settings) as records:
        assert list(records.rows.values()) == rows
        assert [records.finished(identity) for identity in "abcd"] == [True, False, True, False]
        assert not records.repaired


def test_every_row_is_in_the_file_at_once(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    with RecordFile(path, settings) as records:
        records.append(make_row("a"))
        assert Row.from_json(path.read_bytes().rstrip(b"\n")).id == "a"
        records.append(make_row("b"))
        assert path.read_bytes().count(b"\n") == 2


def test_a_retried_problem_counts_by_its_last_row(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    with RecordFile(path, settings) as records:
        records.append(make_row("a", error="HTTP 500"))
        assert not records.finished("a")
        records.append(make_row("a"))
        assert records.finished("a")
    with RecordFile(path, settings) as records:
        assert records.finished("a") and len(records.rows) == 1


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_a_file_cut_anywhere_keeps_its_whole_rows(
    tmp_path: Path, settings: dict[str, Any], make_row: Any, cut: int
) -> None:
    path = tmp_path / "cut.jsonl"
    lines = [make_row(identity).to_json().encode() + b"\n" for identity in "abc"]
    content = b"".join(lines)[:cut]
    path.write_bytes(content)
    with RecordFile(path, settings) as records:
        whole = content.count(b"\n")
        # A row that lacks only its newline is whole.
        assert len(records.rows) in (whole, whole + 1)
        records.append(make_row("d"))
    with RecordFile(path, settings) as records:
        assert not records.repaired
        assert list(records.rows)[-1] == "d"
    assert path.read_bytes().endswith(b"\n")


def test_a_torn_last_line_is_reported(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    with RecordFile(path, settings) as records:
        records.append(make_row("a"))
        records.append(make_row("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with RecordFile(path, settings) as records:
        assert records.repaired and list(records.rows) == ["a"]
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"my notes, without a newline", id="text"),
        pytest.param(b'{"a": 1}\n{"b": 2}\n', id="other-jsonl"),
        pytest.param(b'{"a": 1', id="other-torn-jsonl"),
        pytest.param(b'{"format": "sgl-lim-programs/1"}', id="ours-without-fields"),
        pytest.param(b"\x00\xff\n", id="binary"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, settings: dict[str, Any], content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="another --output") as caught:
        RecordFile(path, settings)
    assert f"{path}:1" in str(caught.value)
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    path.parent.mkdir()
    path.write_text(f"{make_row('a').to_json()}\n{make_row('b').to_json()[:50]}\n{make_row('c').to_json()}\n")
    with pytest.raises(RecordError, match=r"out\.jsonl:2"):
        RecordFile(path, settings)


@pytest.mark.parametrize("newline", [True, False])
def test_other_settings_are_refused_and_listed(
    path: Path, settings: dict[str, Any], make_row: Any, newline: bool
) -> None:
    path.parent.mkdir()
    content = make_row("a").to_json() + "\n" * newline
    path.write_text(content)
    other = {**settings, "max_tokens": 80, "problems": {"source": "chains", "seed": 1}}
    with pytest.raises(RecordError) as caught:
        RecordFile(path, other)
    message = str(caught.value)
    assert "max_tokens: file has 72, this run has 80" in message
    assert "problems.seed: file has 0, this run has 1" in message
    assert "another --output" in message and "model" not in message
    assert path.read_text() == content


def test_differences_of_missing_and_unlike_values() -> None:
    assert describe_differences({"a": 1, "b": {"c": 1}}, {"b": 2, "d": None}) == [
        "a: file has 1, this run has null",
        'b: file has {"c": 1}, this run has 2',
    ]
    assert describe_differences({"x": {"y": 1}}, {"x": {"y": 1}}) == []


def test_settings_are_compared_as_json(path: Path, settings: dict[str, Any], make_row: Any) -> None:
    with RecordFile(path, {**settings, "layers": (4, 8)}) as records:
        row = make_row("a")
        records.append(Row(row.id, row.expected, records.settings, 1.0, samples=row.samples))
    with RecordFile(path, {**settings, "layers": (4, 8)}) as records:
        assert records.finished("a")


def test_two_runs_do_not_write_one_file(path: Path, settings: dict[str, Any]) -> None:
    with RecordFile(path, settings), pytest.raises(RecordError, match="another run is writing"):
        RecordFile(path, settings)
    RecordFile(path, settings).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file/out"):
        RecordFile(tmp_path / "file" / "out.jsonl", settings)
    with pytest.raises(RecordError, match="cannot be opened"):
        RecordFile(tmp_path, settings)


def test_a_full_disk_is_an_error(settings: dict[str, Any], make_row: Any, path: Path) -> None:
    with RecordFile(path, settings) as records, open("/dev/full", "wb", buffering=0) as full:
        records._file.close()
        records._file = full
        with pytest.raises(RecordError, match="No space left"):
            records.append(make_row("a"))
        assert not records.finished("a")


def test_a_row_is_one_ascii_line(make_row: Any) -> None:
    text = make_row("a", error="line\nbreak ≤ \ud800").to_json()
    assert text.isascii() and "\n" not in text
    assert json.loads(text)["format"] == "sgl-lim-programs/1"
