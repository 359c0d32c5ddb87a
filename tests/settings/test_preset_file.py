"""Preset files: what is read back, refused and preferred."""

import argparse
import json
from pathlib import Path

import pytest

from sgl_lim.settings import flags as under_test
from sgl_lim.settings import preset_file
from sgl_lim.settings.config import ENV, configure
from sgl_lim.settings.layers import resolve_layers
from sgl_lim.settings.preset_file import PresetError
from sgl_lim.settings.refusals import model_problems


def test_a_file_reads_back_as_it_was(preset, preset_path, model):
    assert preset_file.load_for(preset_path, model) == preset
    assert [path.name for path in Path(preset_path).parent.iterdir()] == ["preset.json"]


def test_a_file_of_the_first_format_is_read(preset, preset_path, tmp_path):
    measured = {"coverage": 0.5, "lowest": 0.25, "lowest_layer": 9, "rows": 100}

    def age(content):
        content["format"] = "sgl-lim-preset/1"
        for entry in content["entries"]:
            del entry["selection_attends"], entry["measured"]
            entry.update(measured)
        content["entries"][0]["weighted_coverage"] = 0.625
        content["entries"][1]["weighted_coverage"] = None

    old = preset_file.load(write(tmp_path / "old.json", preset_path, age))
    assert [entry.selection_layers for entry in old.entries] == [entry.selection_layers for entry in preset.entries]
    assert {entry.selection_attends for entry in old.entries} == {"context"}
    assert [entry.measured for entry in old.entries] == [measured | {"weighted_coverage": 0.625}, measured, measured]


def test_an_entry_of_today_need_not_say_what_was_measured(preset_path, tmp_path):
    def shorten(content):
        del content["entries"][0]["measured"], content["entries"][1]["selection_attends"]

    first, second, _ = preset_file.load(write(tmp_path / "short.json", preset_path, shorten)).entries
    assert first.measured == {} and second.selection_attends == "context"


def test_layers_attend_to_what_the_file_says(preset_path):
    assert [entry.selection_attends for entry in preset_file.load(preset_path).entries] == ["context", "set", "context"]


@pytest.mark.parametrize(
    ("budget", "nearest"), [(1, 64), (64, 64), (127, 64), (128, 64), (129, 256), (511, 256), (513, 1024), (9999, 1024)]
)
def test_the_nearest_budget_by_ratio_decides(preset, budget, nearest):
    assert preset.nearest(budget).budget == nearest


def write(path, preset_path, change):
    content = json.loads(Path(preset_path).read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="sgl-lim-preset/9"), "not a preset of the format sgl-lim-preset/2"),
        (lambda c: c.update(layers=[1]), r"unknown layers; known keys are architecture, calibration, entries"),
        (lambda c: c.pop("rule"), "missing rule"),
        (lambda c: c.pop("calibration"), "missing calibration"),
        (lambda c: c["rule"].update(mean=1), "rule must have method and may have aggregate, recency, sinks, scope"),
        (lambda c: c.update(rule=None), "rule and calibration must be objects"),
        (lambda c: c.update(num_layers="12"), "num_layers must be a positive integer"),
        (lambda c: c.update(architecture=None), "architecture a text"),
        (lambda c: c.update(entries=[]), "entries must be a list of at least one"),
        (lambda c: c.update(entries=[3]), "an entry must be an object"),
        (lambda c: c["entries"][0].update(selections=2), "unknown selections"),
        (lambda c: c["entries"][0].update(coverage=0.5), "unknown coverage"),
        (lambda c: c["entries"][0].pop("budget"), "missing budget"),
        (lambda c: c["entries"][0].update(measured=[0.5]), r"measured must be an object, got \[0.5\]"),
        (lambda c: c["entries"][0].update(measured=None), "measured must be an object, got None"),
        (lambda c: c["entries"][0].update(selection_attends="all"), "selection_attends must be one of context, set"),
        (lambda c: c["entries"][0].update(selection_attends=["set"]), "selection_attends must be one of context, set"),
        (lambda c: c["entries"][0].update(budget=0), "budget must be a positive integer, got 0"),
        (lambda c: c["entries"][0].update(budget=True), "budget must be a positive integer, got True"),
        (lambda c: c["entries"].reverse(), "increasing budgets"),
        (lambda c: c["entries"][0].update(selection_layers=[]), "selection_layers must be increasing layers below 12"),
        (lambda c: c["entries"][0].update(selection_layers=[8, 2]), "must be increasing layers"),
        (lambda c: c["entries"][0].update(selection_layers=[2, 2]), "must be increasing layers"),
        (lambda c: c["entries"][0].update(selection_layers=[2, 12]), "must be increasing layers below 12"),
        (lambda c: c["entries"][0].update(selection_layers="2,8"), "must be increasing layers"),
        (lambda c: c["entries"][0].update(selection_layers=[[2], 8]), "must be increasing layers"),
        (lambda c: c["entries"][0].update(selection_layers=[False, 8]), "must be increasing layers"),
    ],
)
def test_what_is_no_preset_is_refused(preset_path, tmp_path, change, message):
    path = write(tmp_path / "changed.json", preset_path, change)
    with pytest.raises(PresetError, match=message) as refused:
        preset_file.load(path)
    assert str(refused.value).startswith(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", r"not JSON .*python -m sgl_lim\.calibrate"),
        (b"[]", "not a preset"),
        (b"\xff", "not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PresetError, match=message):
        preset_file.load(str(path))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": 36}, "made for a model of 12 layers, and this one has 36; calibrate this one"),
        ({"architectures": ("LlamaForCausalLM",)}, "made for a Qwen3ForCausalLM, and this model is a LlamaForCausalLM"),
        ({"architectures": ()}, "this model is a nameless"),
    ],
    ids=str,
)
def test_another_model_is_refused_with_the_flag(preset_path, model_of, other, message):
    (reason,) = model_problems(configure(preset=preset_path), model_of(**other))
    assert reason.startswith(f"--lim-preset {preset_path}: ") and message in reason


def test_early_sets_need_a_layer_before_the_preset_s_first(preset_path, model):
    assert model_problems(configure(preset=preset_path, budget=64, early_sets=True), model) == []
    (reason,) = model_problems(configure(preset=preset_path, budget=1024, early_sets=True), model)
    assert reason.startswith("--lim-early-sets on: no layer comes before") and "those of --lim-preset" in reason
    layers = configure(preset=preset_path, budget=1024, early_sets=True, selection_layers=(2, 8))
    assert model_problems(layers, model) == []


def test_a_server_that_differs_from_the_calibration_is_told(preset_path, model):
    assert resolve_layers(configure(budget=64, preset=preset_path), model).remarks == ()
    told = resolve_layers(configure(budget=64, preset=preset_path, aggregate="max", scope="kv_head"), model).remarks
    assert all(text.startswith(f"--lim-preset {preset_path} was calibrated with ") for text in told)
    assert [text.split("with ")[1] for text in told] == ["aggregate union, not max", "scope global, not kv_head"]


def test_the_rule_is_what_was_asked_for_at_every_budget():
    # The window of so small a budget has no place for sinks.
    small = configure(budget=8).build()
    assert small.settings()["sinks"] == 0
    assert preset_file.rule_of(small) == preset_file.rule_of(configure().build())
    assert preset_file.rule_of(configure(method="tidaldecode").build()) == {
        "method": "tidaldecode",
        "aggregate": "union",
        "scope": "kv_head",
    }


def test_a_control_is_told_its_method_alone(preset):
    assert preset.differences(configure(method="window", sinks=0).build()) == ["method lessismore, not window"]


def parse(*flags):
    parser = argparse.ArgumentParser()
    under_test.add_flags(parser)
    under_test.take_flags(parser.parse_args(flags))
    return under_test.load()


def test_the_flag_wins_over_layers_of_the_variable(monkeypatch):
    monkeypatch.setenv(ENV, json.dumps({"budget": 128, "selection_layers": [3, 9]}))
    assert parse("--lim-preset", "a.json") == configure(budget=128, preset="a.json")
    monkeypatch.setenv(ENV, json.dumps({"selection_layers": [3, 9]}))
    both = parse("--lim-preset", "a.json", "--lim-selection-layers", "2,8")
    assert both == configure(preset="a.json", selection_layers=(2, 8))


def test_the_variable_may_name_a_preset(monkeypatch):
    monkeypatch.setenv(ENV, json.dumps({"preset": "a.json"}))
    assert under_test.load() == configure(preset="a.json") and under_test.load().problems() == []
    (reason,) = configure(preset=3).problems()
    assert reason.startswith("--lim-preset must be the path of a file")
