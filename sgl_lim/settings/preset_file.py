"""The file that calibration writes and a server takes by `--lim-preset`.

It decides the selection layers and nothing else: they may differ by budget, and a server takes those of the calibrated
budget that is nearest to its own. What else the model was calibrated with is kept for comparison; a server that
differs in it says so and goes on.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_lim.methods import Method
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.methods.ranked import Ranked

FORMAT = "sgl-lim-preset/2"
FIRST_FORMAT = "sgl-lim-preset/1"
"""Still read. Its selection layers attend to the whole context, and its entries carry what `_FIRST_MEASURED` names."""
_FIRST_MEASURED = ("coverage", "lowest", "lowest_layer", "rows", "weighted_coverage")
COMPARED = ("method", "aggregate", "recency", "sinks", "scope")


class PresetError(ValueError):
    """A preset file cannot be used; the message begins with its path."""


@dataclass(frozen=True)
class Entry:
    """Selection layers for one budget, what they attend to, and what calibration found of them."""

    budget: int
    selection_layers: tuple[int, ...]
    selection_attends: str = "context"
    measured: dict[str, Any] = field(default_factory=dict)
    """For people and `/server_info`: any names, with values that JSON has."""


@dataclass(frozen=True)
class PresetFile:
    """A calibration's outcome."""

    architecture: str
    num_layers: int
    entries: tuple[Entry, ...]  # by increasing budget
    rule: dict[str, Any]  # of `COMPARED` the method, and those of the others that it has
    calibration: dict[str, Any] = field(default_factory=dict)  # how it was made: for people

    def nearest(self, budget: int) -> Entry:
        """The entry whose budget is nearest by ratio; of two as near, the smaller."""
        return min(self.entries, key=lambda entry: (abs(math.log(entry.budget / budget)), entry.budget))

    def differences(self, method: Method) -> list[str]:
        """Parameters of the calibrated rule that are not the server's, as `aggregate max, not union`.

        Of another method only the name: its other parameters mean something else.
        """
        served = rule_of(method)
        names = served if method.name == self.rule["method"] else ("method",)
        return [
            f"{name} {self.rule[name]}, not {served[name]}"
            for name in names
            if name in self.rule and self.rule[name] != served[name]
        ]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")
        partial.replace(path)


def rule_of(method: Method) -> dict[str, Any]:
    """What of a method's parameters decides which layers fit it: as asked for, whatever the budget makes of them."""
    own = parameters_of(type(method))
    return {"method": method.name, **{name: getattr(method, name) for name in COMPARED if name in own}}


def load(path: str) -> PresetFile:
    """Read a preset file.

    Raises:
        PresetError: unreadable, no such file, or a key that is missing, unknown or of the wrong type.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PresetError(f"{path}: {error.strerror or error}; write one with python -m sgl_lim.calibrate") from error
    except ValueError as error:
        raise PresetError(f"{path}: not JSON ({error}); write it with python -m sgl_lim.calibrate") from error
    written_as = content.pop("format", None) if isinstance(content, dict) else None
    if written_as not in (FORMAT, FIRST_FORMAT):
        raise PresetError(f"{path}: not a preset of the format {FORMAT}; write it with python -m sgl_lim.calibrate")
    _check_keys(path, content, PresetFile)
    entries = content["entries"]
    if not isinstance(entries, list) or not entries:
        raise PresetError(f"{path}: entries must be a list of at least one, got {entries!r}")
    if written_as == FIRST_FORMAT:
        entries = [_from_first_format(entry) for entry in entries]
    if not all(isinstance(content[name], dict) for name in ("rule", "calibration")):
        raise PresetError(f"{path}: rule and calibration must be objects")
    if "method" not in content["rule"] or not set(content["rule"]) <= set(COMPARED):
        raise PresetError(
            f"{path}: rule must have method and may have {', '.join(COMPARED[1:])}, got "
            f"{', '.join(sorted(content['rule']))}"
        )
    if not _is_count(content["num_layers"]) or not isinstance(content["architecture"], str):
        raise PresetError(f"{path}: num_layers must be a positive integer and architecture a text")
    parsed = tuple(_entry(path, entry, content["num_layers"]) for entry in entries)
    if any(b.budget <= a.budget for a, b in itertools.pairwise(parsed)):
        raise PresetError(f"{path}: entries must have increasing budgets")
    return PresetFile(**{**content, "entries": parsed})


def load_for(path: str, model: Any) -> PresetFile:
    """Read a preset file for a model.

    Args:
        model: SGLang's model config.

    Raises:
        PresetError: as `load`, or it was made for another depth or architecture.
    """
    preset = load(path)
    depth, architectures = model.num_hidden_layers, list(model.hf_config.architectures or [])
    if preset.num_layers != depth:
        raise PresetError(
            f"{path}: made for a model of {preset.num_layers} layers, and this one has {depth}; calibrate this one"
        )
    if preset.architecture not in architectures:
        raise PresetError(
            f"{path}: made for a {preset.architecture}, and this model is a {', '.join(architectures) or 'nameless'}; "
            "calibrate this one"
        )
    return preset


def _from_first_format(entry: Any) -> Any:
    """An entry of the first format as one of today's; what is no entry stays for `_entry` to refuse."""
    if not isinstance(entry, dict) or "measured" in entry:
        return entry
    measured = {name: entry[name] for name in _FIRST_MEASURED if entry.get(name) is not None}
    return {**{name: entry[name] for name in entry if name not in _FIRST_MEASURED}, "measured": measured}


def _entry(path: str, entry: Any, num_layers: int) -> Entry:
    if not isinstance(entry, dict):
        raise PresetError(f"{path}: an entry must be an object, got {entry!r}")
    _check_keys(path, entry, Entry)
    layers = entry["selection_layers"]
    if (
        not isinstance(layers, list)
        or not layers
        or not all(type(i) is int and 0 <= i < num_layers for i in layers)
        or layers != sorted(set(layers))
    ):
        raise PresetError(f"{path}: selection_layers must be increasing layers below {num_layers}, got {layers!r}")
    if not _is_count(entry["budget"]):
        raise PresetError(f"{path}: budget must be a positive integer, got {entry['budget']!r}")
    if "selection_attends" in entry:
        problem = parameters_of(Ranked)["selection_attends"].form.problem(entry["selection_attends"])
        if problem is not None:
            raise PresetError(f"{path}: selection_attends{problem}")
    if not isinstance(entry.get("measured", {}), dict):
        raise PresetError(f"{path}: measured must be an object, got {entry['measured']!r}")
    return Entry(**{**entry, "selection_layers": tuple(layers)})


def _check_keys(path: str, content: dict[str, Any], kind: type[Any]) -> None:
    optional = ("selection_attends", "measured")
    names = {one.name for one in dataclasses.fields(kind)}
    required = names - set(optional)
    unknown, missing = sorted(set(content) - names), sorted(required - set(content))
    if unknown or missing:
        told = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
        raise PresetError(f"{path}: {' and '.join(told)}; known keys are {', '.join(sorted(names))}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
