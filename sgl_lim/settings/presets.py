"""Selection layers by model, and the stated default for a model without a preset."""

import logging
from dataclasses import dataclass
from typing import Any

from sgl_lim.methods import Method
from sgl_lim.methods.parameters import flag, parameters_of
from sgl_lim.settings import preset_file
from sgl_lim.settings.config import LimConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """Selection layers measured for one checkpoint family."""

    name: str
    num_layers: int
    selection_layers: tuple[int, ...]
    source: str


PRESETS = (
    Preset("qwen3-8b", 36, (2, 12), "LessIsMore, arXiv 2508.07101"),
    Preset("qwen3-4b", 36, (2, 20), "LessIsMore, arXiv 2508.07101"),
    Preset("deepseek-r1-distill-llama-8b", 32, (2, 13), "LessIsMore, arXiv 2508.07101"),
    Preset("chain-tracer", 12, (2, 8), "measured: models/chain-tracer/README.md"),
    Preset("source-reader", 12, (1, 5, 8), "measured: docs/accuracy.md"),
)


def find_preset(model_path: str, num_layers: int) -> Preset | None:
    """The preset whose name occurs in the model's path (any case, `_` as `-`) and whose depth is the model's.

    The last part of the path that names a preset decides: folders above a checkpoint may name other models, and the
    hub's snapshot folders below it name none.
    """
    for part in reversed(model_path.lower().replace("_", "-").split("/")):
        for preset in PRESETS:
            if preset.name in part and preset.num_layers == num_layers:
                return preset
    return None


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Selection layers without a preset: 2 and a third of the depth, where Qwen3-8B's correction layer lies."""
    first = min(2, num_layers - 1)
    correction = num_layers // 3
    return (first, correction) if correction > first else (first,)


def resolve_layers(config: LimConfig, model: Any) -> tuple[tuple[int, ...], str]:
    """Selection layers and where they come from: the flag, else a preset file, else a built-in preset, else a default.

    Methods that have none get none, whatever was asked for, so that methods can be compared under the same flags.

    Args:
        model: SGLang's model config.

    Raises:
        preset_file.PresetError: the preset file cannot be used with this model.
    """
    assert config.kind is not None
    if "selection_layers" not in parameters_of(config.kind):
        return (), f"method {config.kind.name} has none"
    if config.selection_layers is not None:
        return config.selection_layers, flag("selection_layers")
    if config.preset is None:
        return selection_layers_for(model.model_path, model.num_hidden_layers)
    preset = preset_file.load_for(config.preset, model)
    method = config.build()
    entry = preset.nearest(method.budget)
    for reason in preset.differences(method):
        logger.warning("sgl-lim: --lim-preset %s was calibrated with %s", config.preset, reason)
    return entry.selection_layers, f"--lim-preset {config.preset}, calibrated at budget {entry.budget}"


def resolve_method(config: LimConfig, model: Any) -> tuple[Method, str]:
    """The configured method for a model, and where its selection layers come from. Arguments as `resolve_layers`."""
    assert config.kind is not None
    ignored = config.ignored()
    if config.preset is not None and "selection_layers" not in parameters_of(config.kind):
        ignored.append(flag("preset"))
    if ignored:
        logger.warning("sgl-lim: --lim-method %s does not use %s", config.method, ", ".join(ignored))
    layers, source = resolve_layers(config, model)
    return config.build(selection_layers=layers), source


def selection_layers_for(model_path: str, num_layers: int) -> tuple[tuple[int, ...], str]:
    """Selection layers and where they come from; warns once where no preset fits."""
    preset = find_preset(model_path, num_layers)
    if preset is not None:
        return preset.selection_layers, f"preset {preset.name}"
    layers = default_layers(num_layers)
    logger.warning(
        "sgl-lim has no preset for %s (%d layers): selection layers %s by default. They decide the accuracy: compare "
        "some choices of --lim-selection-layers on your own prompts with --lim-method full as the control.",
        model_path,
        num_layers,
        ",".join(map(str, layers)),
    )
    return layers, "default"
