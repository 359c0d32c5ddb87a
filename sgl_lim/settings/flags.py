"""The flags `--lim-…` and the environment variable that carries them to SGLang's workers.

The launcher's flags win over the environment variable, which wins over what is known of the model. The launcher writes
the result back into the environment variable, which SGLang's spawned workers inherit.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_lim.methods import DEFAULT, METHODS
from sgl_lim.methods.parameters import Parameter, flag, parameters_of
from sgl_lim.methods.registry import choices_of
from sgl_lim.settings.config import ENV, LimConfig, RefusedConfig, configure


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--lim-…` flags to SGLang's parser; an absent flag leaves the environment's value."""
    group = parser.add_argument_group("LessIsMore sparse decode (sgl-lim)", "Used with --attention-backend lessismore.")
    group.add_argument(
        flag("method"),
        type=str,
        choices=sorted(METHODS),
        default=argparse.SUPPRESS,
        help=f"Selection method (default {DEFAULT.name}).",
    )
    for declared in METHODS.parameters().values():
        _add(group, declared, only=() if len(declared) == len(METHODS) else tuple(declared))
    for name, one in parameters_of(LimConfig).items():
        _add(group, {name: one}, only=())


def take_flags(args: argparse.Namespace) -> list[str]:
    """Merge parsed flags over `LESSISMORE_CONFIG` and write the result back for the workers to inherit.

    Returns:
        The flags that were given, as typed.
    """
    names = ("method", *METHODS.parameters(), *parameters_of(LimConfig))
    given = {name: getattr(args, f"lim_{name}") for name in names if hasattr(args, f"lim_{name}")}
    if given:
        values = read_environment()
        if "preset" in given:
            # Layers that the variable names would win over the file, which a flag names.
            values.pop("selection_layers", None)
        os.environ[ENV] = json.dumps({**values, **given})
    return [flag(name) for name in given]


def load() -> LimConfig:
    """Configuration of this process. Raises `RefusedConfig` for an environment variable that cannot be read."""
    values = read_environment()
    forms = {name: next(iter(declared.values())).form for name, declared in METHODS.parameters().items()}
    forms |= {name: one.form for name, one in parameters_of(LimConfig).items()}
    for name in set(values) & set(forms):
        try:
            values[name] = forms[name].read(values[name])
        except argparse.ArgumentTypeError as error:
            raise RefusedConfig([f"{ENV}: {name}: {error}"]) from None
    return configure(**values)


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


def _add(group: Any, declared: Mapping[str, Parameter], only: tuple[str, ...]) -> None:
    """One flag, declared by one or more methods under the same name; the first declaration says what it is."""
    one = next(iter(declared.values()))
    notes = [] if one.default in (None, ()) else [f"default {one.form.show(one.default)}"]
    notes += [f"methods: {', '.join(only)}"] * bool(only)
    # SGLang writes a list of its `--config` as several arguments behind the flag.
    of_values = (
        {"action": _Joined, "nargs": "+", "parse": one.form.parse} if one.form.takes_list else {"type": one.form.parse}
    )
    group.add_argument(
        one.flag,
        **of_values,
        choices=choices_of(declared),
        metavar=one.form.metavar,
        default=argparse.SUPPRESS,
        # argparse formats its help by %.
        help=(f"{one.help} ({'; '.join(notes)})." if notes else f"{one.help}.").replace("%", "%%"),
    )


# SGLang takes flags of its own kinds of actions alone from `--config`.
class _Joined(argparse._StoreAction):
    """Stores one value whose parts, separated by commas, may also be arguments of their own."""

    def __init__(self, *args: Any, parse: Callable[[str], Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self._parse = parse

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Parse the arguments as one text."""
        try:
            value = self._parse(",".join(values or ()))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, value)
