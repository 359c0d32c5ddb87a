"""Where selection layers come from: the order, what is said of them, and what cannot stop a server."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_lim.settings import flags as flags_module
from sgl_lim.settings import kept_calibration
from sgl_lim.settings.config import ENV, configure
from sgl_lim.settings.kept_calibration import FOLDER_ENV, keep, path_of
from sgl_lim.settings.layers import (
    CALIBRATION_TAKES,
    SPACED,
    full_reads,
    layers_for,
    parameters,
    resolve_layers,
    spaced_layers,
)
from sgl_lim.settings.preset_file import PresetError
from sgl_lim.settings.refusals import model_problems


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder for kept calibrations."""
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path / "kept"))
    return tmp_path / "kept"


def checkpoint(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return str(folder)


@pytest.fixture
def measured(preset, tmp_path, model_of):
    """The config of a model without a built-in preset, for which a calibration is kept."""
    path = checkpoint(tmp_path / "some")
    keep(preset, path)
    return model_of(path=path)


@pytest.mark.parametrize("depth", range(1, 100))
def test_spaced_layers_fit_any_depth(depth):
    layers = spaced_layers(depth)
    assert list(layers) == sorted(set(layers)) and layers[0] >= 0
    # The last layer's set would be read by none, where there is another layer.
    assert layers[-1] < max(1, depth - 1)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, (0,)), (2, (0,)), (3, (1,)), (4, (2,)), (7, (2,)), (8, (2, 6)), (12, (2, 6, 10)), (15, (2, 6, 10))],
)
def test_spaced_layers_are_every_fourth(depth, layers):
    assert spaced_layers(depth) == layers


@pytest.mark.parametrize(
    ("layers", "attends", "reads"),
    [((2, 12), "context", 4), ((2, 12), "set", 3), ((0,), "set", 0.5), ((3,), "context", 4)],
)
def test_full_reads_are_of_dense_and_selection_layers(layers, attends, reads):
    assert full_reads(layers, attends) == reads


def test_the_order(preset_path, preset, tmp_path, model_of):
    """Each is there, and is taken away in turn."""
    model = model_of(path=checkpoint(tmp_path / "chain-tracer"))
    kept = keep(preset, model.model_path)
    found = resolve_layers(configure(budget=256, preset=preset_path, selection_layers=(3, 9)), model)
    assert (found.selection_layers, found.selection_attends) == ((3, 9), "context")
    assert (found.source, found.measured) == ("--lim-selection-layers", None)

    found = resolve_layers(configure(budget=200, preset=preset_path), model)
    assert (found.selection_layers, found.selection_attends) == ((1, 7), "set")
    assert found.source == f"--lim-preset {preset_path}, calibrated at budget 256"
    assert found.measured == {"agreement": 0.95, "tokens": 100}

    found = resolve_layers(configure(budget=2000), model)
    assert (found.selection_layers, found.selection_attends) == ((0, 5), "context")
    assert found.source == f"the calibration kept in {kept}, calibrated at budget 1024"
    assert found.measured is not None and set(found.measured) == {"agreement", "tokens", "kept_on"}

    kept.unlink()
    found = resolve_layers(configure(budget=200), model)
    assert (found.selection_layers, found.selection_attends) == ((2, 8), "context")
    assert (found.source, found.measured, found.remarks) == ("preset chain-tracer", None, ())

    Path(model.model_path).rename(tmp_path / "nameless")
    model.model_path = str(tmp_path / "nameless")
    found = resolve_layers(configure(budget=200), model)
    assert (found.selection_layers, found.selection_attends) == ((2, 6, 10), "set")
    assert (found.source, found.measured) == (SPACED, None)


@pytest.mark.parametrize("attends", ["context", "set"])
def test_what_the_user_says_that_layers_attend_to_always_wins(measured, preset_path, model, attends):
    for config, served in (
        (configure(selection_attends=attends, selection_layers=(2, 4)), model),
        (configure(selection_attends=attends, preset=preset_path, budget=256), model),
        (configure(selection_attends=attends, budget=1024), measured),
        (configure(selection_attends=attends, selection_layers="default"), measured),
        (configure(selection_attends=attends), model),
    ):
        found = resolve_layers(config, served)
        assert found.selection_attends == attends
        assert config.build(**parameters(found)).selection_attends == attends


def test_default_ignores_what_was_kept_and_the_file(measured, preset_path, model_of, preset, tmp_path):
    for config in (configure(selection_layers="default"), configure(selection_layers="default", preset=preset_path)):
        found = resolve_layers(config, measured)
        assert (found.selection_layers, found.source, found.remarks) == ((2, 6, 10), SPACED, ())
        assert config.build(**parameters(found)).selection_layers == (2, 6, 10)
        assert config.problems() == [] and model_problems(config, measured) == []
    known = model_of(path=checkpoint(tmp_path / "chain-tracer"))
    keep(preset, known.model_path)
    found = resolve_layers(configure(selection_layers="default"), known)
    assert found.selection_layers == (2, 8) and found.source == "preset chain-tracer"


def test_the_word_comes_by_flag_variable_and_as_it_is_shown(monkeypatch):
    import argparse

    parser = argparse.ArgumentParser()
    flags_module.add_flags(parser)
    monkeypatch.delenv(ENV, raising=False)
    flags_module.take_flags(parser.parse_args(["--lim-selection-layers", "default"]))
    expected = configure(selection_layers="default")
    assert flags_module.load() == expected
    monkeypatch.setenv(ENV, json.dumps({"selection_layers": "default"}))
    assert flags_module.load() == expected and expected.build().selection_layers == ()
    (problem,) = configure(selection_layers="Default").problems()
    assert "such as 2,12, or default, got 'Default'" in problem


def test_a_kept_result_is_as_a_file_that_is_named(measured):
    found = resolve_layers(configure(budget=64, aggregate="max", selection_attends="set"), measured)
    assert found.selection_layers == (2, 8) and found.source.endswith("calibrated at budget 64")
    (remark,) = found.remarks
    assert remark.startswith("the calibration kept in ") and remark.endswith("calibrated with aggregate union, not max")


def test_a_copy_finds_the_result_and_a_fine_tune_does_not(measured, model_of, tmp_path):
    import shutil

    copied = shutil.copytree(measured.model_path, tmp_path / "copy")
    assert resolve_layers(configure(budget=64), model_of(path=str(copied))).selection_layers == (2, 8)
    (copied / "model.safetensors").write_bytes(b"enos")
    assert resolve_layers(configure(budget=64), model_of(path=str(copied))).source == SPACED


def test_dummy_weights_are_no_checkpoint_s(measured):
    assert resolve_layers(configure(), measured).source != SPACED
    assert resolve_layers(configure(), measured, "dummy").source == SPACED


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"format": "other"}', b""], ids=repr)
def test_a_file_that_cannot_be_used_is_told_once_and_left_out(measured, content):
    path = path_of(measured.model_path)
    path.write_bytes(content)
    found = resolve_layers(configure(), measured)
    assert found.source == SPACED
    broken, unmeasured = found.remarks
    assert broken.startswith(f"the calibration that was kept for this checkpoint cannot be used: {path}: ")
    assert broken.endswith("or delete the file") and "was never measured" in unmeasured
    assert model_problems(configure(), measured) == []


def test_a_kept_result_of_another_depth_is_left_out(measured):
    measured.num_hidden_layers = 8
    found = resolve_layers(configure(), measured)
    assert found.selection_layers == (2, 6) and "made for 12 layers, and this model has 8" in found.remarks[0]


def test_a_folder_in_place_of_the_file_is_left_out(measured):
    path = path_of(measured.model_path)
    path.unlink()
    path.mkdir()
    assert "cannot be used" in resolve_layers(configure(), measured).remarks[0]


def test_without_a_home_nothing_is_found(model, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(FOLDER_ENV)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    model.model_path = checkpoint(tmp_path / "some")
    assert resolve_layers(configure(), model).source == SPACED


def test_results_are_kept_in_the_user_s_cache(monkeypatch, tmp_path, preset):
    path = checkpoint(tmp_path / "some")
    monkeypatch.delenv(FOLDER_ENV)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = keep(preset, path)
    assert kept.parent == tmp_path / "cache" / "sgl-lim" / "calibrations"
    found = kept_calibration.find(path, 12)
    assert found is not None and found.preset.entries == preset.entries and found.kept_on is not None
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


def test_a_later_result_takes_the_place_of_an_earlier_one(measured, preset):
    import dataclasses

    keep(dataclasses.replace(preset, entries=preset.entries[:1]), measured.model_path)
    assert resolve_layers(configure(budget=1024), measured).selection_layers == (2, 8)


def test_what_has_no_weights_cannot_be_kept(preset, tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        keep(preset, str(tmp_path / "none"))


def test_a_checkpoint_that_was_never_measured_is_told_what_to_do(model_of):
    (told,) = resolve_layers(configure(), model_of(path="/models/my model", layers=30)).remarks
    assert "`python -m sgl_lim.calibrate --model-path '/models/my model'`" in told
    assert "Layers 2,6,10,14,18,22,26 select" in told and "attend to the sets that they choose" in told
    assert "as much as 5.5 of the model's 30 layers" in told and CALIBRATION_TAKES in told
    (told,) = resolve_layers(configure(selection_attends="context"), model_of(path="m", layers=30)).remarks
    assert "as much as 9 of the model's 30 layers" in told and "attend to the whole context" in told


def test_the_command_names_the_folder_of_a_revision(model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    model.revision = "a" * 40
    (told,) = resolve_layers(configure(), model).remarks
    assert "--model-path some/model`" in told
    folder.mkdir(parents=True)
    (told,) = resolve_layers(configure(), model).remarks
    assert f"--model-path {folder}`" in told


@pytest.mark.parametrize("values", [{"selection_layers": (2, 4)}, {"method": "full"}, {"method": "window"}], ids=str)
def test_who_names_layers_or_selects_nothing_is_not_told(model, values):
    assert resolve_layers(configure(**values), model).remarks == ()


@pytest.mark.parametrize("name", ["full", "quest"])
def test_a_method_without_selection_layers_says_that_it_ignores_them(name):
    model = SimpleNamespace(model_path="my-model", num_hidden_layers=30)
    found = resolve_layers(configure(method=name), model)
    assert (found.selection_layers, found.source, found.remarks) == ((), f"method {name} has none", ())
    config = configure(method=name, selection_layers=(2, 9), preset="x.json", aggregate="max")
    found = resolve_layers(config, model)
    assert "selection_layers" not in config.build(**parameters(found)).settings()
    (said,) = found.remarks
    assert said == f"--lim-method {name} does not use --lim-selection-layers, --lim-aggregate, --lim-preset"


def test_a_path_gets_what_a_server_of_it_gets(measured, preset, tmp_path, model_of):
    built_in = model_of(path=checkpoint(tmp_path / "chain-tracer"))
    for model in (measured, built_in, model_of(path="elsewhere")):
        for budget in (64, 256, 1024):
            config = configure(budget=budget)
            assert layers_for(model.model_path, 12, config) == resolve_layers(config, model)


def test_early_sets_need_a_layer_before_the_first_of_any_source(measured, model_of):
    (reason,) = model_problems(configure(budget=1024, early_sets=True), measured)
    assert reason.startswith("--lim-early-sets on: no layer comes before") and "those of the calibration kept" in reason
    assert model_problems(configure(budget=64, early_sets=True), measured) == []
    (reason,) = model_problems(configure(early_sets=True), model_of(layers=1))
    assert f"those of {SPACED}" in reason


def test_a_named_file_that_cannot_be_used_is_refused(measured):
    with pytest.raises(PresetError):
        resolve_layers(configure(preset="/no/such/file"), measured)
