"""Parameters of a method: dataclass fields that say which flag sets them, how it is written and what it may be.

A field that is declared by `parameter` needs no other line anywhere: its flag, `--help`, the environment variable,
YAML, `/server_info` and what is refused all follow from the declaration.
"""

import argparse
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST = 2**31 - 1
"""Lengths are int32 on the device."""
_KEY = "sgl_lim.parameter"
_SWITCH = {"on": True, "off": False, "true": True, "false": False}


class Form(ABC):
    """How the value of a parameter is written, and which values there are."""

    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    takes_list = False
    """Whether its text has parts, separated by commas, that a YAML list may give one by one."""

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The value that a command line's text means. Raises argparse.ArgumentTypeError with what was expected."""

    @abstractmethod
    def problem(self, value: object) -> str | None:
        """What is wrong with a value, to be read after the flag's name; None if it is right."""

    def read(self, value: Any) -> Any:
        """The value that JSON or YAML means; what cannot be read comes back as it is, for `problem` to tell."""
        return value

    def show(self, value: Any) -> str:
        """A value as a user types it."""
        return str(value)


@dataclass(frozen=True)
class Whole(Form):
    """A whole number, `least` or more; `hint` follows the message, `beyond` says why none is above int32."""

    least: int = 1
    metavar: str | None = "N"
    hint: str = ""
    beyond: str = "no request has so many tokens"

    def parse(self, text: str) -> int:
        """Its text as an integer."""
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None

    def problem(self, value: object) -> str | None:
        """Neither a float nor a truth value is a whole number."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            expected = "a positive integer" if self.least == 1 else f"an integer >= {self.least}"
            return f" must be {expected}, got {value!r}{self.hint}"
        return f" {value}: {self.beyond}; lower it" if value > MOST else None


@dataclass(frozen=True)
class Share(Form):
    """A number between 0 and 1; with `auto` that word as well, with `inside` neither 0 nor 1 themselves."""

    metavar: str | None = "R"
    auto: bool = False
    inside: bool = False
    hint: str = ""

    def parse(self, text: str) -> float | str:
        """Its text as a float, `auto` as it is."""
        try:
            return text if self.auto and text == "auto" else float(text)
        except ValueError:
            expected = "a share or auto" if self.auto else "a share"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    def problem(self, value: object) -> str | None:
        """A truth value is no number."""
        if self.auto and value == "auto":
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (0 < value < 1 or (not self.inside and value in (0, 1))):  # type: ignore[operator]
            return None
        return (
            f" must {'lie' if self.inside else 'be'} between 0 and 1{', or auto' * self.auto}, got {value!r}{self.hint}"
        )


@dataclass(frozen=True)
class Choice(Form):
    """One of some words."""

    choices: tuple[str, ...] | None = ()

    def parse(self, text: str) -> str:
        """Its text."""
        return text

    def problem(self, value: object) -> str | None:
        """Only the words themselves are right."""
        words = self.choices or ()
        if isinstance(value, str) and value in words:
            return None
        return f" must be {'one of ' * (len(words) > 1)}{', '.join(words)}, got {value!r}"


@dataclass(frozen=True)
class Switch(Form):
    """On or off."""

    metavar: str | None = "{on,off}"

    def parse(self, text: str) -> bool:
        """`on` and `off`, and what YAML makes of them."""
        if text.lower() not in _SWITCH:
            raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
        return _SWITCH[text.lower()]

    def problem(self, value: object) -> str | None:
        """Only truth values are right."""
        return None if isinstance(value, bool) else f" must be on or off, got {value!r}"

    def read(self, value: Any) -> Any:
        """Words as the flag takes them."""
        return _SWITCH.get(value.lower(), value) if isinstance(value, str) else value

    def show(self, value: Any) -> str:
        """`on` or `off`."""
        return "on" if value else "off"


@dataclass(frozen=True)
class Increasing(Form):
    """Increasing whole numbers, `least` or more, separated by commas; or the one `word` that stands for them."""

    least: int = 0
    metavar: str | None = "I,J"
    noun: str = "layer indices"
    example: str = "2,12"
    takes_list = True
    word: str | None = None

    def parse(self, text: str) -> tuple[int, ...] | str:
        """`2,12` as (2, 12), the word as it is."""
        if text == self.word:
            return text
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            expected = f"{self.noun} separated by commas{self._or_word()}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    def problem(self, value: object) -> str | None:
        """They must be there, whole, large enough and in order."""
        if self.word is not None and value == self.word:
            return None
        whole = isinstance(value, tuple) and all(type(one) is int and one >= self.least for one in value)
        if not whole or not value:
            return f" must be {self.noun} such as {self.example}{self._or_word()}, got {value!r}"
        assert isinstance(value, tuple)
        return f" must increase, got {self.show(value)}" if any(b <= a for a, b in pairwise(value)) else None

    def read(self, value: Any) -> Any:
        """A list, or text as the flag takes it."""
        if isinstance(value, str):
            return self.parse(value)
        return tuple(value) if isinstance(value, list) else value

    def show(self, value: Any) -> str:
        """As typed."""
        return value if isinstance(value, str) else ",".join(map(str, value))

    def _or_word(self) -> str:
        return "" if self.word is None else f", or {self.word}"


@dataclass(frozen=True)
class Text(Form):
    """Any text; `noun` says which."""

    noun: str = "a text"
    metavar: str | None = None

    def parse(self, text: str) -> str:
        """Its text."""
        return text

    def problem(self, value: object) -> str | None:
        """Nothing but text."""
        return None if isinstance(value, str) else f" must be {self.noun}, got {value!r}"


@dataclass(frozen=True)
class Parameter:
    """One parameter, as its class declares it."""

    name: str
    default: Any
    """None where nothing is set, or where the default is derived; `help` then says so."""
    form: Form
    help: str
    missing: str | None
    """Why a method without this parameter cannot be asked for it; None if it may, and is told that it does nothing."""
    missing_for: tuple[Any, ...] = ()
    """The values that `missing` is about; () if about all but the default."""

    @property
    def flag(self) -> str:
        """The flag that sets it."""
        return flag(self.name)

    def typed(self, value: Any) -> str:
        """Flag and value as on a command line."""
        return f"{self.flag} {self.form.show(value)}"

    def is_refused_without(self, value: Any) -> bool:
        """Whether a method that lacks this parameter is refused with this value of it."""
        return self.missing is not None and (value in self.missing_for if self.missing_for else value != self.default)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, the flag's name first; None if it is right, or not set and need not be."""
        if value is None and self.default is None:
            return None
        found = self.form.problem(value)
        return None if found is None else f"{self.flag}{found}"


def parameter(
    default: Any, form: Form, help: str, *, missing: str | None = None, missing_for: tuple[Any, ...] = ()
) -> Any:
    """A dataclass field that is a parameter; arguments as in `Parameter`."""
    return dataclasses.field(default=default, metadata={_KEY: (form, help, missing, missing_for)})


def parameters_of(kind: type) -> dict[str, Parameter]:
    """The parameters of a dataclass by name, in the order of its fields."""
    return {
        field.name: Parameter(field.name, field.default, *field.metadata[_KEY])
        for field in dataclasses.fields(kind)
        if _KEY in field.metadata
    }


def flag(name: str) -> str:
    """The flag of a parameter's name."""
    return f"--lim-{name.replace('_', '-')}"


def leave_one_out(flags: Sequence[str], reason: str) -> list[str]:
    """One refusal for each flag: the flag, the reason, and the way out."""
    return [f"{one} {reason}; leave one of them out" for one in flags]
