"""Which layers select, what they attend to, where that comes from, and what was measured of it.

The first of these decides: `--lim-selection-layers`, `--lim-preset`, a calibration that was kept for the checkpoint,
the built-in preset, the spaced default.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgl_lim.methods import Role
from sgl_lim.methods.parameters import flag, parameters_of
from sgl_lim.methods.selection_layers import DEFAULT_LAYERS
from sgl_lim.settings import kept_calibration, preset_file
from sgl_lim.settings.config import LimConfig
from sgl_lim.settings.fingerprint import NoCheckpoint, local_path
from sgl_lim.settings.preset_file import Entry, PresetError, PresetFile
from sgl_lim.settings.presets import find_preset

SPACED = "spaced default"
SPACED_FIRST = 2
SPACED_STEP = 4
SPACED_ATTENDS = "set"
CALIBRATION_TAKES = "a minute or two on a GPU, some minutes on a CPU"
_ATTENDS = {"context": "the whole context", "set": "the sets that they choose"}
_READS = {"context": 1.0, "set": 0.5}
"""What of its context a selection layer reads: keys and values, or about the keys alone."""


@dataclass(frozen=True)
class Layers:
    """The layers of a server, resolved."""

    selection_layers: tuple[int, ...]
    """Increasing; () where the method has none."""
    selection_attends: str
    source: str
    """For people, to be read after `selection layers from`."""
    measured: Mapping[str, Any] | None = None
    """What calibration found of them, with values that JSON has; None where they are not of a calibration."""
    remarks: tuple[str, ...] = ()
    """What a server has to say at its start, as warnings."""


def spaced_layers(num_layers: int) -> tuple[int, ...]:
    """Selection layers of a checkpoint that nobody measured: every fourth one from 2 on, without the last layer.

    No layer would read what the last one chose. A model of less than four layers gets one selection layer: the last but
    one, or its only layer.
    """
    first = max(0, min(SPACED_FIRST, num_layers - 2))
    return tuple(range(first, num_layers - 1, SPACED_STEP)) or (0,)


def full_reads(selection_layers: tuple[int, ...], attends: str) -> float:
    """How many layers' whole context a decode step reads: of dense layers, and of selection layers by what they attend.

    Sets come on top.
    """
    return selection_layers[0] + _READS[attends] * len(selection_layers)


def resolve_layers(config: LimConfig, model: Any, load_format: str = "auto") -> Layers:
    """The layers that a server takes.

    Methods that have none get none, whatever was asked for, so that methods can be compared under the same flags.

    Args:
        model: SGLang's model config.
        load_format: SGLang's; dummy weights are no checkpoint's.

    Raises:
        PresetError: the file of `--lim-preset` cannot be used with this model.
    """
    assert config.kind is not None
    has_layers = "selection_layers" in parameters_of(config.kind)
    if not has_layers:
        found = Layers((), "context", f"method {config.kind.name} has none")
    elif isinstance(config.selection_layers, tuple):
        found = Layers(config.selection_layers, "context", flag("selection_layers"))
    elif config.preset is not None and config.selection_layers is None:
        preset = preset_file.load_for(config.preset, model)
        found = _of_preset(config, preset, f"{flag('preset')} {config.preset}")
    else:
        revision = getattr(model, "revision", None)
        found = _without_flags(config, model.model_path, model.num_hidden_layers, revision, load_format)
    ignored = config.ignored() + [flag("preset")] * (config.preset is not None and not has_layers)
    if ignored:
        remark = f"--lim-method {config.method} does not use {', '.join(ignored)}"
        found = dataclasses.replace(found, remarks=(*found.remarks, remark))
    return dataclasses.replace(found, selection_attends=config.given.get("selection_attends", found.selection_attends))


def layers_for(model_path: str, num_layers: int, config: LimConfig) -> Layers:
    """What a server of a path takes where no flag names layers, for tools that serve nothing."""
    return _without_flags(config, model_path, num_layers, None, "auto")


def _without_flags(
    config: LimConfig, model_path: str, num_layers: int, revision: str | None, load_format: str
) -> Layers:
    """Of what was kept, unless the user asks for the default; of the built-in preset; by the spaced default."""
    remarks: tuple[str, ...] = ()
    asked_for_default = config.selection_layers == DEFAULT_LAYERS
    if not asked_for_default and load_format != "dummy":
        try:
            kept = kept_calibration.find(model_path, num_layers, revision)
            if kept is not None:
                found = _of_preset(config, kept.preset, f"the calibration kept in {kept.path}")
                dated = {} if kept.kept_on is None else {kept_calibration.KEPT_ON: kept.kept_on}
                return dataclasses.replace(found, measured={**(found.measured or {}), **dated})
        except PresetError as error:
            remarks = (f"the calibration that was kept for this checkpoint cannot be used: {error}",)
    built_in = find_preset(model_path, num_layers)
    if built_in is not None:
        return Layers(built_in.selection_layers, "context", f"preset {built_in.name}", remarks=remarks)
    layers = Layers(spaced_layers(num_layers), SPACED_ATTENDS, SPACED, remarks=remarks)
    if asked_for_default:
        return layers
    # The command knows no revisions.
    measured = model_path if revision is None else _folder_of(model_path, revision)
    return dataclasses.replace(layers, remarks=(*remarks, *_unmeasured(config, layers, measured, num_layers)))


def _folder_of(model_path: str, revision: str) -> str:
    try:
        return str(local_path(model_path, revision))
    except NoCheckpoint:
        return model_path


def _of_preset(config: LimConfig, preset: PresetFile, source: str) -> Layers:
    """The layers of a file, with what of its rule is not the server's."""
    method = config.build()
    entry: Entry = preset.nearest(method.budget)
    return Layers(
        entry.selection_layers,
        entry.selection_attends,
        f"{source}, calibrated at budget {entry.budget}",
        measured=entry.measured,
        remarks=tuple(f"{source} was calibrated with {reason}" for reason in preset.differences(method)),
    )


def _unmeasured(config: LimConfig, layers: Layers, model_path: str, num_layers: int) -> list[str]:
    """The paragraph for a checkpoint that nobody measured; none where the method selects nothing."""
    method = config.build(**parameters(layers))
    if Role.SELECT not in method.layer_roles(num_layers):
        return []
    attends = config.given.get("selection_attends", layers.selection_attends)
    command = f"python -m sgl_lim.calibrate --model-path {shlex.quote(model_path)}"
    read = full_reads(layers.selection_layers, attends)
    listed = ",".join(map(str, layers.selection_layers))
    return [
        "this checkpoint was never measured: it has neither a built-in preset nor a calibration of yours. Layers "
        f"{listed} select, by the spaced default, and attend to {_ATTENDS[attends]}. Beside the sets, a decode step "
        f"reads as much as {read:g} of the model's {num_layers} layers would read densely. To measure which layers fit "
        f"this checkpoint, and what these ones lose, run `{command}`. It takes {CALIBRATION_TAKES}. Later starts find "
        "its result by themselves."
    ]


def parameters(layers: Layers) -> dict[str, Any]:
    """The parameters of a method that the layers decide, for `LimConfig.build`."""
    return {"selection_layers": layers.selection_layers, "selection_attends": layers.selection_attends}
