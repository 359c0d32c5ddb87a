"""Configuration of sparse decode: one frozen record of what the user asked for, and what is wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_lim.methods import DEFAULT, METHODS, Method
from sgl_lim.methods.parameters import Choice, Share, Switch, Text, flag, parameter, parameters_of
from sgl_lim.methods.selection_layers import DEFAULT_LAYERS

ENV = "LESSISMORE_CONFIG"


class RefusedConfig(ValueError):
    """A configuration that cannot work; the message lists every reason with its flag and the way out."""

    def __init__(self, reasons: list[str]) -> None:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"--attention-backend lessismore cannot serve this configuration:\n{listed}")
        self.reasons = reasons


@dataclass(frozen=True)
class LimConfig:
    """What the user asked for: the method, its parameters as far as they were given, and what is no method's own.

    `configure` makes one from values by name.
    """

    method: str = DEFAULT.name
    given: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of methods by name. The method need not have them all, so that methods take the same flags."""
    preset: str | None = parameter(
        None,
        Text("the path of a file by sgl_lim.calibrate", metavar="FILE"),
        "Selection layers from a file by python -m sgl_lim.calibrate; --lim-selection-layers wins over it",
    )
    dense_backend: str | None = parameter(
        None,
        Text("the name of a backend of SGLang"),
        "SGLang backend for prefill and dense layers (default: fa3, flashinfer or torch_native by the device)",
    )
    drafts: str = parameter(
        "guided",
        Choice(("guided", "unguided")),
        "With --speculative-algorithm LESSISMORE: drafts read the sets that verification chose, or choose their own",
    )
    vary_drafts: bool = parameter(
        True,
        Switch(),
        "With --speculative-algorithm LESSISMORE: draft fewer tokens than --speculative-num-steps, or none, where that "
        "is faster",
    )
    verify_groups: bool = parameter(
        False,
        Switch(),
        "With --speculative-algorithm LESSISMORE on a GPU: verify by operators that read a prefix once which several "
        "requests share, in place of the dense backend's",
    )
    drawn_acceptance: float | None = parameter(
        None,
        Share(hint=": the probability with which a draft is accepted"),
        "For benchmarks alone, because ANSWERS ARE WRONG: with --speculative-algorithm LESSISMORE, accept each draft "
        "with this probability, whatever the model says. Random weights accept nothing",
    )
    prefix_groups: bool = parameter(
        True, Switch(), "Read a prefix that several requests of a batch share once for all of them"
    )

    @property
    def kind(self) -> type[Method] | None:
        """The method's class, None where the name is no method's."""
        return METHODS.get(self.method) if isinstance(self.method, str) else None

    @property
    def selection_layers(self) -> Any:
        """The selection layers that were given, `DEFAULT_LAYERS` among them; None if none were."""
        return self.given.get("selection_layers")

    def own_parameters(self) -> dict[str, Any]:
        """Those of the given parameters that the method has; a word for selection layers is for a model to resolve."""
        assert self.kind is not None
        given = {
            name: value for name, value in self.given.items() if (name, value) != ("selection_layers", DEFAULT_LAYERS)
        }
        return {name: given[name] for name in parameters_of(self.kind) if name in given}

    def ignored(self) -> list[str]:
        """Flags, as typed, of given parameters that the method does not have and that do nothing with it."""
        assert self.kind is not None
        declared, own = METHODS.parameters(), parameters_of(self.kind)
        return [next(iter(declared[name].values())).flag for name in self.given if name not in own]

    def build(self, **instead: Any) -> Method:
        """The method with its parameters.

        Args:
            instead: values that replace those given, such as `selection_layers` of a model, or a budget; those that
                the method does not have are left out.
        """
        assert self.kind is not None
        own = parameters_of(self.kind)
        return self.kind(**{**self.own_parameters(), **{name: instead[name] for name in instead if name in own}})

    def problems(self) -> list[str]:
        """Reasons why these values cannot work with any model; empty if they can."""
        found = [] if self.kind is not None else [_unknown_method(self.method)]
        general = (one.problem(vars(self)[name]) for name, one in parameters_of(LimConfig).items())
        found += [problem for problem in general if problem is not None]
        found += self._value_problems()
        method = self.sound_method()
        if method is None:
            return found
        found += method.conflicts()
        if method.needs_prefix_groups and self.prefix_groups is False:
            found.append(
                f"{method.needs_prefix_groups} needs the groups that --lim-prefix-groups off does not look for; "
                "leave one of them out"
            )
        return found

    def _value_problems(self) -> list[str]:
        """Values that are wrong by themselves, and parameters that the method does not have."""
        found, kind = [], self.kind
        for name, declared in METHODS.parameters().items():
            if name not in self.given:
                continue
            value, any_method = self.given[name], next(iter(declared.values()))
            one = declared.get(self.method) if kind is not None else any_method
            problem = (one or any_method).problem(value)
            if problem is not None:
                as_any = one is None or one.form == any_method.form
                found.append(problem if as_any else f"{problem} (--lim-method {self.method})")
            elif one is None and any_method.is_refused_without(value):
                found.append(
                    f"{any_method.typed(value)}: --lim-method {self.method} {any_method.missing}; leave the flag out"
                )
        return found

    def sound_method(self) -> Method | None:
        """The method with those of its parameters that are right by themselves; None where the name is no method's.

        What does not go together can be told although other values are wrong.
        """
        if self.kind is None:
            return None
        own = parameters_of(self.kind)
        return self.kind(**{n: v for n, v in self.own_parameters().items() if own[n].problem(v) is None})


def configure(**values: Any) -> LimConfig:
    """A configuration from values by name: of the record itself, or of any method's parameter.

    A parameter of a method that is None (JSON's null) counts as not given.

    Raises:
        RefusedConfig: a name that nothing has.
    """
    general = {"method", *parameters_of(LimConfig)}
    known = general | set(METHODS.parameters())
    unknown = sorted(set(values) - known)
    if unknown:
        raise RefusedConfig([f"{ENV} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"])
    given = {name: value for name, value in values.items() if name not in general and value is not None}
    return LimConfig(given=given, **{name: value for name, value in values.items() if name in general})


def _unknown_method(name: object) -> str:
    return f"{flag('method')} must be one of {', '.join(sorted(METHODS))}, got {name!r}"
