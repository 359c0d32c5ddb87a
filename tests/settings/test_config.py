"""Where configuration comes from, which source wins, and what is refused."""

import argparse
import json
import math

import pytest

from sgl_lim.methods import METHODS, Keeping, LessIsMore
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.settings import flags as under_test
from sgl_lim.settings.config import ENV, LimConfig, RefusedConfig, configure
from support.gates import with_gates


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv(ENV, "")


def parse(*flags: str) -> LimConfig:
    parser = argparse.ArgumentParser()
    under_test.add_flags(parser)
    under_test.take_flags(parser.parse_args(flags))
    return under_test.load()


def test_defaults_are_the_paper_s():
    assert parse() == configure()
    method = configure().build()
    assert method == LessIsMore(budget=2048, recency=0.25, sinks=4, aggregate="union")


def test_every_flag_arrives():
    got = parse(
        *("--lim-method", "window", "--lim-budget", "512", "--lim-recency", "0.5", "--lim-sinks", "8"),
        *("--lim-selection-layers", "3,9", "--lim-aggregate", "max", "--lim-dense-backend", "triton"),
    )
    assert got == configure(
        method="window",
        budget=512,
        recency=0.5,
        sinks=8,
        selection_layers=(3, 9),
        aggregate="max",
        dense_backend="triton",
    )
    assert got.problems() == []


def test_flags_win_over_the_environment_and_the_rest_of_it_stays(monkeypatch):
    monkeypatch.setenv(ENV, json.dumps({"budget": 128, "sinks": 2, "selection_layers": [1, 5]}))
    assert parse("--lim-budget", "256") == configure(budget=256, sinks=2, selection_layers=(1, 5))


def test_environment_may_name_a_file(monkeypatch, tmp_path):
    path = tmp_path / "lim.json"
    path.write_text('{"budget": 96, "selection_layers": "2,4"}')
    monkeypatch.setenv(ENV, str(path))
    assert under_test.load() == configure(budget=96, selection_layers=(2, 4))


def test_environment_takes_switches_as_the_flags_do(monkeypatch):
    monkeypatch.setenv(ENV, '{"prefix_groups": "off", "early_sets": "on"}')
    assert under_test.load() == configure(prefix_groups=False, early_sets=True)
    monkeypatch.setenv(ENV, '{"prefix_groups": "maybe"}')
    assert under_test.load().problems() == ["--lim-prefix-groups must be on or off, got 'maybe'"]


def test_what_was_given_is_told_as_typed():
    parser = argparse.ArgumentParser()
    under_test.add_flags(parser)
    assert under_test.take_flags(parser.parse_args(["--lim-sinks", "2", "--lim-top-p", "0.5"])) == [
        "--lim-top-p",
        "--lim-sinks",
    ]
    assert under_test.take_flags(parser.parse_args([])) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "LESSISMORE_CONFIG must hold a JSON object"),
        ("/no/such/file.json", "LESSISMORE_CONFIG must hold a JSON object"),
        ('{"budgets": 1}', "unknown keys budgets; known are aggregate, budget"),
        ('{"selection_layers": "2;4"}', "expected layer indices separated by commas, or default"),
    ],
    ids=["json", "file", "key", "layers"],
)
def test_unreadable_environment_is_refused(monkeypatch, text, message):
    monkeypatch.setenv(ENV, text)
    with pytest.raises(RefusedConfig, match=message):
        under_test.load()


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--lim-budget", "12.5", "expected a whole number, got '12.5'"),
        ("--lim-top-p", "half", "expected a share, got 'half'"),
        ("--lim-recency", "half", "expected a share or auto, got 'half'"),
        ("--lim-early-sets", "perhaps", "expected on or off, got 'perhaps'"),
        ("--lim-selection-layers", "a,b", "expected layer indices separated by commas, or default, got 'a,b'"),
        ("--lim-method", "x", "invalid choice: 'x'"),
        ("--lim-prefix-selection", "all", "invalid choice: 'all'"),
    ],
)
def test_parser_names_the_flag_and_what_it_expects(flag, text, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flag, text)
    assert stop.value.code == 2 and f"argument {flag}: {expected}" in capsys.readouterr().err


def test_null_counts_as_not_given(monkeypatch):
    monkeypatch.setenv(ENV, '{"selection_layers": null, "scope": null, "top_p": null, "preset": null, "sinks": 2}')
    assert under_test.load() == configure(sinks=2)
    assert under_test.load().problems() == []


@pytest.mark.parametrize("value", [[], {}, [1], [[1]], "", "x", 0.5, math.nan, -1, 2**40, True, "1,2"], ids=repr)
@pytest.mark.parametrize("method", [*METHODS, [], None])
def test_no_value_of_a_wrong_type_is_more_than_refused(monkeypatch, method, value):
    for name in {*METHODS.parameters(), *parameters_of(LimConfig)}:
        monkeypatch.setenv(ENV, json.dumps({"method": method, name: value}))
        try:
            problems = under_test.load().problems()
        except RefusedConfig as refused:
            problems = refused.reasons
        assert all("--lim-" in problem or problem.startswith(ENV) for problem in problems)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"budget": 0}, "--lim-budget"),
        ({"budget": -8}, "--lim-budget"),
        ({"budget": 64.0}, "--lim-budget"),
        ({"budget": True}, "--lim-budget"),
        ({"budget": 1 << 31}, "--lim-budget"),
        ({"selection_interval": 1 << 31}, "--lim-selection-interval"),
        ({"budget": 4, "sinks": 4}, "--lim-budget"),
        ({"sinks": -1}, "--lim-sinks"),
        ({"recency": 1.5}, "--lim-recency"),
        ({"recency": "half"}, "--lim-recency"),
        ({"aggregate": "mean"}, "--lim-aggregate"),
        ({"method": "magic"}, "--lim-method"),
        ({"method": []}, "--lim-method"),
        ({"method": [], "prefix_selection": "group"}, "--lim-method"),
        ({"selection_layers": 2}, "--lim-selection-layers"),
        ({"selection_layers": ()}, "--lim-selection-layers"),
        ({"selection_layers": (2, 2)}, "--lim-selection-layers"),
        ({"selection_layers": (-1, 2)}, "--lim-selection-layers"),
        ({"selection_layers": (1.5,)}, "--lim-selection-layers"),
    ],
    ids=str,
)
def test_impossible_values_are_named(values, flag):
    problems = configure(**values).problems()
    assert len(problems) == 1 and problems[0].startswith(flag)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prefix_selection": "batch"}, "must be one of request, group, got 'batch'"),
        ({"prefix_selection": True}, "must be one of request, group, got True"),
        ({"prefix_selection": "group", "prefix_groups": False}, "--lim-prefix-groups off"),
        ({"prefix_selection": "group", "selection_interval": 4}, "--lim-selection-interval 4"),
        ({"prefix_selection": "group", "method": "window"}, "--lim-method window selects nothing"),
        ({"prefix_selection": "group", "method": "full"}, "--lim-method full selects nothing"),
    ],
    ids=str,
)
def test_selection_by_group_is_refused_where_it_cannot_work(values, reason):
    problems = configure(**values).problems()
    assert len(problems) == 1 and problems[0].startswith("--lim-prefix-selection") and reason in problems[0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"early_sets": "on"}, "must be on or off, got 'on'"),
        ({"method": "window"}, "--lim-method window selects nothing"),
        ({"method": "full"}, "--lim-method full selects nothing"),
        ({"prefix_selection": "group"}, "--lim-prefix-selection group"),
        ({"selection_layers": (0, 5)}, "no layer comes before --lim-selection-layers 0"),
    ],
    ids=str,
)
def test_early_sets_are_refused_where_there_are_none(values, reason):
    problems = configure(**{"early_sets": True, **values}).problems()
    assert len(problems) == 1 and problems[0].startswith("--lim-early-sets") and reason in problems[0]


def test_early_sets_arrive_and_make_sets_outlive_a_step():
    assert parse().build().keeping is None
    assert parse("--lim-early-sets", "on") == configure(early_sets=True)
    assert under_test.load().build().keeping == Keeping(1, True) and under_test.load().problems() == []
    assert parse("--lim-early-sets", "off", "--lim-selection-interval", "2").build().keeping == Keeping(2, False)


def test_selection_by_group_arrives_from_flag_and_environment(monkeypatch):
    assert parse("--lim-prefix-selection", "group") == configure(prefix_selection="group")
    assert under_test.load().problems() == []
    monkeypatch.setenv(ENV, json.dumps({"prefix_selection": "group", "budget": 128}))
    assert parse("--lim-prefix-selection", "request") == configure(budget=128, prefix_selection="request")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"budget": 40},
            "--lim-budget 40: --lim-method quest chooses pages of 16 tokens; take a multiple of 16, such as 48",
        ),
        ({"scope": "global"}, "--lim-scope must be kv_head, got 'global' (--lim-method quest)"),
        ({"prefix_selection": "group"}, "--lim-prefix-selection group: --lim-method quest"),
        ({"selection_interval": 2}, "--lim-selection-interval 2: --lim-method quest"),
        ({"early_sets": True}, "--lim-early-sets on: --lim-method quest"),
        ({"top_p": 0.9, "aggregate": "max"}, "--lim-top-p 0.9: --lim-method quest weighs no tokens"),
        (
            {"recency": "auto", "aggregate": "max"},
            "--lim-recency auto: --lim-method quest weighs no tokens for a window",
        ),
    ],
    ids=str,
)
def test_what_quest_cannot_do_is_refused(values, reason):
    assert configure(method="quest").problems() == [] == configure(method="quest", scope="kv_head").problems()
    (problem,) = configure(method="quest", **values).problems()
    assert reason in problem and any(way in problem for way in ("leave the", "take a multiple", "must be"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_no_method_takes_is_told_without_naming_one(method):
    gates = with_gates(method, 2, 4, 2, 16)
    assert configure(method=method, budget=0, **gates).problems() == configure(budget=0).problems()


def test_all_reasons_are_told_at_once():
    config_ = configure(budget=-1, recency=2, selection_layers=(3, 1))
    message = str(RefusedConfig(config_.problems()))
    assert all(flag in message for flag in ("--lim-budget", "--lim-recency", "--lim-selection-layers"))
