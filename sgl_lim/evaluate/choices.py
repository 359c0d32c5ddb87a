"""What is compared: methods with their parameters, budgets and selection layers, each as a server would build it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_lim.methods import METHODS, Full, Method
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.settings.config import RefusedConfig, configure

_OWN_FLAGS = {"budget": "--budgets", "selection_layers": "--selection"}


@dataclass(frozen=True)
class Choice:
    """One method as it is measured, by the name that the user gave it."""

    spec: str
    method: Method

    @property
    def budget(self) -> int | None:
        """Tokens that a sparse layer reads; None where nothing is sparse."""
        return self.method.settings().get("budget")

    @property
    def layers(self) -> tuple[int, ...]:
        """Selection layers; none where the method has none."""
        return tuple(getattr(self.method, "selection_layers", ()))

    @property
    def name(self) -> str:
        """For progress and tables."""
        parts = [self.spec, ",".join(map(str, self.layers)), "" if self.budget is None else f"K={self.budget}"]
        return " ".join(filter(None, parts))

    def flags(self) -> str:
        """What a server needs to be told to run this."""
        declared, values = parameters_of(type(self.method)), vars(self.method)
        kept = [name for name in values if name in _OWN_FLAGS or values[name] != declared[name].default]
        return " ".join([f"--lim-method {self.method.name}", *(declared[name].typed(values[name]) for name in kept)])


FULL = Choice("full", Full())
"""What all others are compared with."""
ROUNDING = Choice("full in one pass", Full())
"""Full attention again, rounded otherwise: how much agreement rounding alone costs."""


def method_of(
    spec: str, budget: int, selection: tuple[int, ...], recency: float | None = None, attends: str | None = None
) -> Method:
    """A method from `name` or `name:parameter=value:…`; parameters are the fields of a server's configuration.

    Args:
        recency, attends: of a spec that has none itself; None for the default of the method.

    Raises:
        ValueError: a server would refuse this, there is no such parameter, or it needs more than one step at a time.
    """
    name, *settings = spec.split(":")
    given: dict[str, object] = {"budget": budget, "selection_layers": selection}
    if recency is not None:
        given["recency"] = recency
    if attends is not None and name in METHODS and "selection_attends" in parameters_of(METHODS[name]):
        given["selection_attends"] = attends
    for setting in settings:
        parameter, _, value = setting.partition("=")
        given[parameter] = _value(spec, parameter, value)
    config = configure(method=name, **given)
    if problems := config.problems():
        raise RefusedConfig(problems)
    method = config.build()
    if getattr(method, "keeping", None) is not None or method.needs_prefix_groups:
        raise ValueError(f"{spec}: each row is a step of its own here; measure this on a server")
    return method


def _value(spec: str, name: str, text: str) -> object:
    known = METHODS.parameters()
    if name in _OWN_FLAGS:
        raise ValueError(f"{spec}: give {name} with {_OWN_FLAGS[name]}")
    if name not in known:
        raise ValueError(f"{spec}: no parameter {name!r}; there are {', '.join(sorted(set(known) - set(_OWN_FLAGS)))}")
    try:
        return next(iter(known[name].values())).form.parse(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{spec}: {name}: {error}") from error


def choices_of(
    specs: Sequence[str],
    budgets: Sequence[int],
    selections: Sequence[tuple[int, ...]],
    depth: int,
    attends: str | None = None,
) -> list[Choice]:
    """Every method with every budget and every choice of selection layers; full attention first.

    Args:
        depth: layers of the model.
        attends: what selection layers attend to, unless a spec says it itself.

    Raises:
        ValueError: as `method_of`, or a selection layer that the model does not have.
    """
    found = [FULL]
    for layers in selections:
        if max(layers) >= depth:
            raise ValueError(f"--selection {','.join(map(str, layers))}: the model has the layers 0 to {depth - 1}")
    for spec in specs:
        kind = METHODS.get(spec.partition(":")[0])
        selects = kind is None or "selection_layers" in parameters_of(kind)
        for layers in selections if selects else selections[:1]:
            found += [
                Choice(spec, method_of(spec, budget, layers, attends=attends))
                for budget in budgets
                if spec != FULL.spec
            ]
    return found
