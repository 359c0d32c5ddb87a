"""The side-by-side table of summaries."""

import json

import pytest

from sgl_lim.programs.compare import comparison, main

SUMMARY = {
    "accuracy": 0.75,
    "accuracy_interval": [0.5, 0.9],
    "whole_chain_accuracy": 0.5,
    "word_accuracy": 0.98765,
    "generation_tokens": {"mean": 195.25},
    "output_tokens_per_second": 41.26,
    "attended_fraction": 0.4444,
    "prefix_cache_hit_share": 0.5,
}


def test_rows_are_aligned_and_in_order():
    lines = comparison({"dense": SUMMARY, "lim": SUMMARY | {"attended_fraction": None}}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["dense", "lim"]
    assert " ".join(lines[1].split()) == "dense 75.0% [50.0%, 90.0%] - 50.0% 98.77% 195.2 41.3 44.4% 50.0%"
    column = lines[0].index("KV read")
    assert lines[1][column:].startswith("44.4%") and lines[2][column:].startswith("-")


def test_votes_and_the_lengths_error_are_told():
    voted = {"accuracy": 0.5, "interval": [0.25, 0.75]}
    lengths = {"mean": 195.25, "standard_error": 10.0}
    (_, line) = comparison({"lim": SUMMARY | {"majority": voted, "generation_tokens": lengths}}).splitlines()
    assert "50.0% [25.0%, 75.0%]" in line and "195.2 ± 10.0" in line


def test_what_a_run_cannot_say_stands_below():
    """Summaries of before, which have no warnings of their own, are looked at as well."""
    settings = {"max_tokens": 512, "attention": {"method": "lessismore", "budget": 2048}}
    counters = {"tokens_attended": 700, "tokens_dense": 700, "selections": 0}
    told = {"samples": 8, "samples_cut_off": 3, "attended_counters": counters, "settings": settings}
    lines = comparison({"dense": SUMMARY, "lim": SUMMARY | told}).splitlines()
    assert len(lines) == 5 and all(line.startswith("lim: warning: ") for line in lines[3:])
    assert "beyond the budget of 2048 tokens" in lines[3] and "--lim-budget" in lines[3]
    assert "3 of 8 generations were cut off at 512 tokens" in lines[4] and "--max-tokens" in lines[4]


def test_accuracies_of_different_graders_are_not_compared_silently():
    now = SUMMARY | {"settings": {"grader": "math 2 (math-verify 0.9.0)"}}
    assert "graders" not in comparison({"dense": now, "lim": now})
    last = comparison({"dense": SUMMARY, "lim": now}).splitlines()[-1]
    assert "dense by one that is not named, lim by math 2 (math-verify 0.9.0)" in last


def test_command_line_reads_files(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SUMMARY | {"accuracy_interval": None}))
    main([f"first={path}", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("first") and lines[2].startswith("run ")


@pytest.mark.parametrize("content", ["{}", "[1]", '{"accuracy": 1}', "\xff"])
def test_a_file_that_is_no_summary_is_named(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([f"x={path}"])
    assert stop.value.code == 2 and "other.json is" in capsys.readouterr().err


def test_two_summaries_of_one_name_are_refused(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SUMMARY))
    with pytest.raises(SystemExit):
        main([f"run={path}", str(path)])
    assert "run is taken" in capsys.readouterr().err


def test_unreadable_summary_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"x={tmp_path / 'none.json'}"])
    assert stop.value.code == 2 and "none.json is no summary" in capsys.readouterr().err
