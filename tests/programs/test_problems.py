"""Problem sources: ids, specs, and errors that say where."""

import json
from pathlib import Path

import pytest

from sgl_lim.programs.problems import ProblemError, chain_problems, jsonl_problems, needle_problems

ANSWER_FORMS = Path(__file__).parent / "data" / "answer_forms.jsonl"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_longer_chain_run_contains_the_shorter_one_and_has_its_spec() -> None:
    short = chain_problems(2, num_facts=8, num_steps=3, seed=5)
    long = chain_problems(4, num_facts=8, num_steps=3, seed=5)
    assert long.problems[:2] == short.problems
    assert long.spec == short.spec
    assert short.spec != chain_problems(2, num_facts=8, num_steps=3, seed=6).spec
    assert len({problem.id for problem in long.problems}) == 4
    assert long.problems[0].prompt.endswith(":")
    assert long.problems[0].solution is not None
    assert long.problems[0].solution.endswith(f"answer {long.problems[0].answer}")


def test_needles_ask_in_a_chat_or_in_a_plain_text() -> None:
    plain = needle_problems(3, sentences=12, keys=2, seed=0, chat=False)
    chat = needle_problems(2, sentences=12, keys=2, seed=0, chat=True)
    assert plain.spec == chat.spec and plain.kind == "needle" and len({p.id for p in plain.problems}) == 3
    for one, other in zip(plain.problems, chat.problems, strict=False):
        assert one.prompt.endswith("?\nAnswer:") and other.prompt.endswith("?")
        assert one.answer == other.answer and f"is {one.answer}." in one.prompt
    assert plain.spec != needle_problems(3, sentences=13, keys=2, seed=0, chat=False).spec


def test_jsonl_fills_the_template_and_numbers_lines_without_id(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        '{"problem": "1+1 in {braces}?", "answer": 2, "subject": "x"}',
        "",
        '{"id": 7, "problem": "2+2?", "answer": "4"}',
    )
    source = jsonl_problems(path, template="Q: {problem} \\boxed{}")
    assert [(p.id, p.prompt, p.answer) for p in source.problems] == [
        ("line-1", "Q: 1+1 in {braces}? \\boxed{}", "2"),
        ("7", "Q: 2+2? \\boxed{}", "4"),
    ]
    assert all(p.kind == "math" and p.solution is None for p in source.problems)


def test_the_spec_follows_content_and_template(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"problem": "a", "answer": "1"}')
    spec = jsonl_problems(path).spec
    assert jsonl_problems(path, template="{problem}").spec != spec
    write(path, '{"problem": "a", "answer": "2"}')
    assert jsonl_problems(path).spec != spec


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        pytest.param('{"problem": "a"}', [":2", "'answer'", "missing"], id="no-answer"),
        pytest.param('{"question": "a", "answer": "1"}', [":2", "'problem'", "missing", "question"], id="no-problem"),
        pytest.param('{"problem": "a", "answer": null}', [":2", "'answer'", "NoneType"], id="null-answer"),
        pytest.param('{"problem": "a", "answer": true}', [":2", "'answer'", "bool"], id="bool-answer"),
        pytest.param('{"problem": " ", "answer": "1"}', [":2", "'problem'", "empty"], id="empty-problem"),
        pytest.param('{"problem": "a", "answer": "1"', [":2", "not JSON"], id="cut-line"),
        pytest.param('["a", "1"]', [":2", "object", "list"], id="list"),
        pytest.param('{"answer": ' + "1" * 5000 + "}", [":2", "JSON", "4300"], id="endless-number"),
        pytest.param("[" * 100_000, [":2", "JSON"], id="endless-list"),
        pytest.param('{"id": "x", "problem": "b", "answer": "1"}', [":2", "'x'", "line 1"], id="same-id"),
        pytest.param('{"id": [1], "problem": "b", "answer": "1"}', [":2", "'id'", "list"], id="list-id"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    path = write(tmp_path / "p.jsonl", '{"id": "x", "problem": "a", "answer": "1"}', line)
    with pytest.raises(ProblemError) as caught:
        jsonl_problems(path)
    assert str(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_files_without_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="No such file"):
        jsonl_problems(tmp_path / "none.jsonl")
    with pytest.raises(ProblemError, match="no problem in it"):
        jsonl_problems(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ProblemError, match="not UTF-8"):
        jsonl_problems(tmp_path / "binary.jsonl")
    with pytest.raises(ProblemError, match=r"\{problem\}"):
        jsonl_problems(write(tmp_path / "p.jsonl", '{"problem": "a", "answer": "1"}'), template="solve it")


def test_a_line_separator_inside_a_string_does_not_split_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"problem": "a\u2028b\x85c", "answer": "1"}, ensure_ascii=False) + "\n")
    assert len(jsonl_problems(path).problems) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "1"}\n', encoding="utf-8-sig")
    assert len(jsonl_problems(path).problems) == 1


def test_a_file_as_benchmarks_publish_it_is_read() -> None:
    found = jsonl_problems(ANSWER_FORMS)
    assert len(found.problems) == len(ANSWER_FORMS.read_text().splitlines()) > 30
    assert found.problems[1].answer == "070", "a leading zero is part of the answer"
    assert [problem.id for problem in found.problems[:2]] == ["form-0", "form-1"]
