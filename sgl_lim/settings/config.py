"""Configuration of sparse decode: one frozen record, from flags, YAML or one environment variable.

The launcher's flags win over the environment variable, which wins over the model's preset. The launcher writes the
result back into the environment variable, which SGLang's spawned workers inherit.
"""

import argparse
import dataclasses
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lim_kernels.select_tokens import AGGREGATES
from sgl_lim.methods import METHODS, PREFIX_SELECTIONS, SCOPES, Method
from sgl_lim.methods.ranked import Ranked
from sgl_lim.settings import adaptive

ENV = "LESSISMORE_CONFIG"

_MOST = 2**31 - 1
"""Lengths are int32 on the device."""
_SWITCH = {"on": True, "off": False, "true": True, "false": False}
_RECORDS_PLAINLY = "calibration records what each request selects anew at every step; leave the flag out"


class RefusedConfig(ValueError):
    """A configuration that cannot work; the message lists every reason with its flag and the way out."""

    def __init__(self, reasons: list[str]) -> None:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"--attention-backend lessismore cannot serve this configuration:\n{listed}")
        self.reasons = reasons


@dataclass(frozen=True)
class LimConfig:
    """What the user asked for. Fields are the flags `--lim-…`; None means "by preset" or "by device"."""

    method: str = "lessismore"
    budget: int = 2048
    recency: float | str = 0.25
    sinks: int = 4
    selection_layers: tuple[int, ...] | None = None
    aggregate: str = "union"
    dense_backend: str | None = None
    prefix_groups: bool = True
    selection_interval: int = 1
    prefix_selection: str = "request"
    early_sets: bool = False
    preset: str | None = None
    """Path of a file by `sgl_lim.calibrate` that has the selection layers."""
    record_budgets: tuple[int, ...] | None = None
    """Decode densely and record what sets of these budgets would cover; only by the variable, for calibration."""
    scope: str | None = None
    top_p: float | None = None
    top_p_floor: int | None = None

    @property
    def kind(self) -> type[Method] | None:
        """The method's class, None where the name is no method's."""
        return METHODS.get(self.method) if isinstance(self.method, str) else None

    @property
    def auto_recency(self) -> bool:
        """Whether the window's length is found for each set."""
        return self.recency == "auto"

    @property
    def remembers(self) -> bool:
        """Whether sets outlive a step."""
        return self.early_sets or self.selection_interval > 1

    def problems(self) -> list[str]:
        """Reasons why these values cannot work with any model; empty if they can."""
        found = []
        if self.kind is None:
            found.append(f"--lim-method must be one of {', '.join(sorted(METHODS))}, got {self.method!r}")
        sinks_ok = _is_int(self.sinks) and self.sinks >= 0
        if not sinks_ok:
            found.append(f"--lim-sinks must be an integer >= 0, got {self.sinks!r}")
        if not _is_int(self.budget) or self.budget < 1:
            found.append(f"--lim-budget must be a positive integer, got {self.budget!r}; the paper uses 1024 to 6144")
        elif self.budget > _MOST:
            found.append(f"--lim-budget {self.budget}: no context has more than {_MOST} tokens; lower it")
        elif sinks_ok and self.budget <= self.sinks:
            found.append(
                f"--lim-budget {self.budget} leaves no token beside --lim-sinks {self.sinks}; "
                "raise the budget or lower the sinks"
            )
        elif self.kind is not None and self.budget % self.kind.page:
            found.append(
                f"--lim-budget {self.budget}: --lim-method {self.method} chooses pages of {self.kind.page} tokens; "
                f"take a multiple of {self.kind.page}, such as {-(-self.budget // self.kind.page) * self.kind.page}"
            )
        if not self.auto_recency and not adaptive.is_share(self.recency):
            found.append(f"--lim-recency must be between 0 and 1, or auto, got {self.recency!r}")
        if self.aggregate not in AGGREGATES:
            found.append(f"--lim-aggregate must be one of {', '.join(AGGREGATES)}, got {self.aggregate!r}")
        if not isinstance(self.prefix_groups, bool):
            found.append(f"--lim-prefix-groups must be on or off, got {self.prefix_groups!r}")
        if not _is_int(self.selection_interval) or self.selection_interval < 1:
            found.append(f"--lim-selection-interval must be a positive integer, got {self.selection_interval!r}")
        elif self.selection_interval > _MOST:
            found.append(f"--lim-selection-interval {self.selection_interval}: no request has so many steps; lower it")
        elif self.selection_interval > 1 and self.method != "lessismore":
            found.append(
                f"--lim-selection-interval {self.selection_interval}: --lim-method {self.method} selects nothing "
                "that could be kept; leave the interval out"
            )
        found += self._prefix_selection_problems() + self._early_sets_problems() + self._scope_problems()
        found += adaptive.problems(self)
        layers = self.selection_layers
        if layers is not None:
            if (
                not isinstance(layers, tuple)
                or not layers
                or not all(_is_int(layer) and layer >= 0 for layer in layers)
            ):
                found.append(f"--lim-selection-layers must be layer indices such as 2,12, got {layers!r}")
            elif any(b <= a for a, b in itertools.pairwise(layers)):
                found.append(f"--lim-selection-layers must increase, got {','.join(map(str, layers))}")
        if self.preset is not None and not isinstance(self.preset, str):
            found.append(f"--lim-preset must be the path of a file by sgl_lim.calibrate, got {self.preset!r}")
        return found + self._recording_problems()

    def _recording_problems(self) -> list[str]:
        """Calibration asks what one selection a layer, step and request would cover."""
        budgets = self.record_budgets
        if budgets is None:
            return []
        fits = isinstance(budgets, tuple) and all(_is_int(budget) and budget > 0 for budget in budgets)
        if not fits or not budgets or any(b <= a for a, b in itertools.pairwise(budgets)):
            return [f"{ENV}: record_budgets must be increasing positive integers, got {budgets!r}"]
        found = []
        if _is_int(self.sinks) and budgets[0] <= self.sinks:
            found.append(f"--budgets {budgets[0]} leaves no token beside --lim-sinks {self.sinks}; raise it")
        if self.kind is not None and not issubclass(self.kind, Ranked):
            found.append(f"--lim-method {self.method} ranks nothing that could be calibrated; leave the flag out")
        if _is_int(self.selection_interval) and self.selection_interval > 1:
            found.append(f"--lim-selection-interval {self.selection_interval}: {_RECORDS_PLAINLY}")
        if self.early_sets is True:
            found.append(f"--lim-early-sets on: {_RECORDS_PLAINLY}")
        if self.prefix_selection == "group":
            found.append(f"--lim-prefix-selection group: {_RECORDS_PLAINLY}")
        return found

    def _prefix_selection_problems(self) -> list[str]:
        if self.prefix_selection not in PREFIX_SELECTIONS:
            return [
                f"--lim-prefix-selection must be one of {', '.join(PREFIX_SELECTIONS)}, got {self.prefix_selection!r}"
            ]
        if self.prefix_selection != "group":
            return []
        found = []
        if self.kind is not None and self.method != "lessismore":
            found.append(
                f"--lim-prefix-selection group: --lim-method {self.method} selects nothing that rows could agree on; "
                "leave the flag out"
            )
        if self.prefix_groups is False:
            found.append(
                "--lim-prefix-selection group needs the groups that --lim-prefix-groups off does not look for; "
                "leave one of them out"
            )
        if _is_int(self.selection_interval) and self.selection_interval > 1:
            found.append(
                "--lim-prefix-selection group: requests that share a prefix select at different steps with "
                f"--lim-selection-interval {self.selection_interval}; leave one of them out"
            )
        return found

    def _early_sets_problems(self) -> list[str]:
        if not isinstance(self.early_sets, bool):
            return [f"--lim-early-sets must be on or off, got {self.early_sets!r}"]
        if not self.early_sets:
            return []
        found = []
        if self.kind is not None and self.method != "lessismore":
            found.append(
                f"--lim-early-sets on: --lim-method {self.method} selects nothing that could be kept; "
                "leave the flag out"
            )
        if self.prefix_selection == "group":
            found.append(
                "--lim-early-sets on keeps whole sets, and --lim-prefix-selection group chooses smaller ones; "
                "leave one of them out"
            )
        if isinstance(self.selection_layers, tuple) and self.selection_layers[:1] == (0,):
            found.append("--lim-early-sets on: no layer comes before --lim-selection-layers 0; leave the flag out")
        return found

    def _scope_problems(self) -> list[str]:
        """Where each KV head has a set of its own: what takes one set a row."""
        if self.scope is not None and self.scope not in SCOPES:
            return [f"--lim-scope must be one of {', '.join(SCOPES)}, got {self.scope!r}"]
        if self.kind is None:
            return []
        scopes = self.kind.scopes
        if self.scope is not None and self.scope not in scopes:
            return [
                f"--lim-scope {self.scope}: --lim-method {self.method} has {' or '.join(scopes)} alone; "
                "leave the flag out"
            ]
        if (self.scope or scopes[0]) != "kv_head" or self.method != "lessismore":
            # Of other methods these flags are refused anyway.
            return []
        flags = ["--lim-prefix-selection group"] if self.prefix_selection == "group" else []
        flags += ["--lim-early-sets on"] if self.early_sets is True else []
        if _is_int(self.selection_interval) and self.selection_interval > 1:
            flags.append(f"--lim-selection-interval {self.selection_interval}")
        return [f"{flag} takes one set a request, not --lim-scope kv_head; leave one of them out" for flag in flags]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--lim-…` flags to SGLang's parser; an absent flag leaves the environment's value."""
    defaults = LimConfig()
    group = parser.add_argument_group("LessIsMore sparse decode (sgl-lim)", "Used with --attention-backend lessismore.")

    def add(name: str, **options: Any) -> None:
        group.add_argument(f"--lim-{name}", default=argparse.SUPPRESS, **options)

    add("method", type=str, choices=sorted(METHODS), help=f"Selection method (default {defaults.method}).")
    add(
        "budget",
        type=int,
        metavar="K",
        help=f"Tokens a sparse layer attends to, per request (default {defaults.budget}).",
    )
    add(
        "recency",
        type=parse_recency,
        metavar="{R,auto}",
        help=f"Share of the budget kept for recent tokens (default {defaults.recency}); auto: for each set, as large a "
        "share as these hold of the attention, from a sixteenth (32 tokens or a quarter, if more) to a half.",
    )
    add("sinks", type=int, metavar="S", help=f"Leading tokens that are always kept (default {defaults.sinks}).")
    add(
        "selection-layers",
        type=parse_layers,
        metavar="I,J",
        help="Layers that attend fully and choose the set; earlier ones stay dense (default: the model's preset).",
    )
    add(
        "preset",
        type=str,
        metavar="FILE",
        help="Selection layers from a file by python -m sgl_lim.calibrate; --lim-selection-layers wins over it.",
    )
    add("aggregate", type=str, choices=AGGREGATES, help=f"How heads agree on one set (default {defaults.aggregate}).")
    add(
        "top-p",
        type=float,
        metavar="P",
        help="Sets have no more tokens than hold this share of the attention (default: always the whole budget).",
    )
    add(
        "top-p-floor",
        type=int,
        metavar="N",
        help="Tokens that sets have at least with --lim-top-p (default: an eighth of the budget).",
    )
    add(
        "scope",
        type=str,
        choices=SCOPES,
        help="One set for all heads, or one for each KV head, ranked over its query heads (default: the method's).",
    )
    add(
        "dense-backend",
        type=str,
        help="SGLang backend for prefill and dense layers (default: fa3, flashinfer or torch_native by the device).",
    )
    add(
        "prefix-groups",
        type=parse_switch,
        metavar="{on,off}",
        help="Read a prefix that several requests of a batch share once for all of them (default on).",
    )
    add(
        "prefix-selection",
        type=str,
        choices=PREFIX_SELECTIONS,
        help="Who chooses the tokens of a shared prefix: each request for itself, or all of a group together, so that "
        f"sparse layers read them once as well (default {defaults.prefix_selection}).",
    )
    add(
        "selection-interval",
        type=int,
        metavar="N",
        help="Select every N-th decode step; in between a request's set is kept, its window moving along (default 1).",
    )
    add(
        "early-sets",
        type=parse_switch,
        metavar="{on,off}",
        help="Layers before the first selection layer attend to its set of the step before (default off).",
    )


def take_flags(args: argparse.Namespace) -> list[str]:
    """Merge parsed flags over `LESSISMORE_CONFIG` and write the result back for the workers to inherit.

    Returns:
        The flags that were given, as typed.
    """
    given = {
        field.name: getattr(args, f"lim_{field.name}")
        for field in dataclasses.fields(LimConfig)
        if hasattr(args, f"lim_{field.name}")
    }
    if given:
        values = read_environment()
        if "preset" in given:
            # Layers that the variable names would win over the file, which a flag names.
            values.pop("selection_layers", None)
        os.environ[ENV] = json.dumps({**values, **given})
    return [f"--lim-{name.replace('_', '-')}" for name in given]


def load() -> LimConfig:
    """Configuration of this process. Raises `RefusedConfig` for an environment variable that cannot be read."""
    values = read_environment()
    names = {field.name for field in dataclasses.fields(LimConfig)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise RefusedConfig([f"{ENV} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(names))}"])
    layers = values.get("selection_layers")
    if isinstance(layers, str):
        layers = _layers_or_refuse(layers)
    if isinstance(layers, list):
        layers = tuple(layers)
    if layers is not None:
        values["selection_layers"] = layers
    for name in ("prefix_groups", "early_sets"):
        # As the flag takes it; what is neither on nor off is told with all other problems.
        if isinstance(values.get(name), str):
            values[name] = _SWITCH.get(values[name].lower(), values[name])
    if isinstance(values.get("record_budgets"), list):
        values["record_budgets"] = tuple(values["record_budgets"])
    return LimConfig(**values)


def read_environment() -> dict[str, Any]:
    """The JSON object in `LESSISMORE_CONFIG`, given inline or as the path of a file; {} if unset."""
    text = os.environ.get(ENV, "").strip()
    if not text:
        return {}
    try:
        if not text.startswith("{"):
            text = Path(text).read_text()
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise RefusedConfig([f"{ENV} must hold a JSON object or the path of a file with one: {error}"]) from error
    if not isinstance(values, dict):
        raise RefusedConfig([f"{ENV} must hold a JSON object, got {type(values).__name__}"])
    return values


def parse_layers(text: str) -> tuple[int, ...]:
    """`"2,12"` as (2, 12). Raises argparse's error type, so that the parser names the flag."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer indices separated by commas, got {text!r}") from None


def parse_recency(text: str) -> float | str:
    """`"0.25"` as 0.25, `"auto"` as it is."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a share or auto, got {text!r}") from None


def parse_switch(text: str) -> bool:
    """`"on"` as True, `"off"` as False; what YAML makes of them as well."""
    if text.lower() not in _SWITCH:
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return _SWITCH[text.lower()]


def _layers_or_refuse(text: str) -> tuple[int, ...]:
    try:
        return parse_layers(text)
    except argparse.ArgumentTypeError as error:
        raise RefusedConfig([f"{ENV}: selection_layers: {error}"]) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
