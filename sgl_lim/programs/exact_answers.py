"""Which answers are one, as far as their forms decide it without math-verify."""

import re
from dataclasses import replace

from sgl_lim.programs.answer_forms import Form, read
from sgl_lim.programs.decimals import has_end, has_enough_digits

_NOUNS = frozenset(
    ["triangle", "function", "number", "line", "angle", "integer", "direction", "quadrilateral", "polygon"]
)
_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


def plainly_same(one: Form, other: Form) -> bool | None:
    """Whether two answers are one, whichever is the right one; None if math-verify has to say."""
    parts = (one.unit, other.unit), (one.name, other.name), (one.choice, other.choice), (one.modulus, other.modulus)
    if any(_differ(*pair) for pair in parts):
        return False
    if one.base is not None or other.base is not None:
        return one.base == other.base and one.text == other.text
    if one.spelling == other.spelling or _same_choice(one, other):
        return True
    if one.number is not None and other.number is not None:
        return _same_number(one, other)
    if r"\ldots" in one.text + other.text:
        return False  # report: "1, 2, ..., n equals 1, 3, ..., 2n - 1" (#14)
    if ":" in one.text + other.text:
        return _same_parts(one.text.split(":"), other.text.split(":"))
    if {_shape(one.text), _shape(other.text)} == {"round", "braces"}:
        return False  # report: "{1, 2} equals (1, 2)"
    if _WORD.fullmatch(one.text) or _WORD.fullmatch(other.text):
        words = _singular(one.text), _singular(other.text)
        return words[0] == words[1] or _without_noun(*words) or _without_noun(*reversed(words))
    return None


def read_alike(one: Form, other: Form) -> tuple[Form, Form]:
    """Report: "100,200 is not 100, 200": where one is a list, the other may be one too that was read as a number."""
    return _as_list(one, other), _as_list(other, one)


def _as_list(form: Form, other: Form) -> Form:
    interval = other.text[:1] == "[" or other.text[-1:] == "]"
    if form.listed is None or interval or _shape(other.text) == "other":
        return form
    return replace(form, text=form.listed, number=None)


def for_library(one: Form, other: Form) -> tuple[str, str]:
    """Two answers as math-verify compares them best.

    With its name as the left side, where the other is an equation: y = 2x + 3 and y - 2x = 3. In the brackets of the
    other, where one has none: else 1, -2 is the pair (-2, 1), because math-verify sorts what has no brackets.
    """
    if (one.name is None) != (other.name is None) and "=" in one.text + other.text:
        return one.as_equation, other.as_equation
    shapes = _shape(one.text), _shape(other.text)
    if shapes == ("round", "bare"):
        return one.text, f"{one.text[0]}{other.text}{one.text[-1]}"
    if shapes == ("bare", "round"):
        return f"{other.text[0]}{one.text}{other.text[-1]}", other.text
    return _both_signs(one.text), _both_signs(other.text)


def _both_signs(text: str) -> str:
    r"""Report: "\frac{1 \pm \sqrt{5}}{2} is not read": an element with a double sign is two elements."""
    if not _SIGNS.search(text) or _shape(text) == "round":
        return text
    opening, inner, closing = (r"\{", text[2:-2], r"\}") if _shape(text) == "braces" else ("", text, "")
    elements: list[str] = []
    for element in _elements_of(inner):
        both = [element] if not _SIGNS.search(element) else [_with_sign(element, upper) for upper in (True, False)]
        elements += both
    return opening + ", ".join(elements) + closing


def _with_sign(element: str, upper: bool) -> str:
    signs = {"pm": "+" if upper else "-", "mp": "-" if upper else "+"}
    return _SIGNS.sub(lambda sign: f" {signs[sign.group(1)]} ", element).strip().removeprefix("+").strip()


def _elements_of(text: str) -> list[str]:
    """What stands between the commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _shape(text: str) -> str:
    """Which brackets are around a list."""
    if text.startswith(r"\{"):
        return "braces"
    if "," not in text or r"\begin" in text:
        return "other"
    if re.fullmatch(r"[(\[][^()\[\]]*(?:\([^()]*\)[^()\[\]]*)*[)\]]", text):
        return "round"
    return "bare" if not re.search(r"[()\[\]]", text) else "other"


def _differ(one: str | int | None, other: str | int | None) -> bool:
    """Whether both answers have a unit, a name or the like, and not the same."""
    return one is not None and other is not None and one != other


def _same_choice(one: Form, other: Form) -> bool:
    """Whether one is the letter of the other, which may also say what the letter stands for."""
    return (one.choice is not None and one.choice in (other.choice, other.text)) or (
        other.choice is not None and other.choice == one.text
    )


def _without_noun(short: list[str], long: list[str]) -> bool:
    """Report: "isosceles triangle is not isosceles", while a right triangle is no right angle."""
    return long[:-1] == short != [] and long[-1] in _NOUNS and short[-1] not in _NOUNS


def _singular(text: str) -> list[str]:
    return [word.removesuffix("s") for word in text.casefold().split()]


def _same_parts(one: list[str], other: list[str]) -> bool | None:
    """Report: "12:00 equals 1:00" (#14): ratios and times part by part."""
    if len(one) != len(other):
        return False
    verdicts = [plainly_same(read(a), read(b)) for a, b in zip(one, other, strict=True)]
    return all(verdicts) if None not in verdicts else False


def _same_number(one: Form, other: Form) -> bool:
    assert one.number is not None and other.number is not None
    if one.number == other.number:
        return True  # also 12% of 12: per cent were asked for
    values = [form.number / 100 if form.percent else form.number for form in (one, other) if form.number is not None]
    if values[0] == values[1]:
        return True
    if (one.ulp is None) == (other.ulp is None):
        return False
    decimal, exact = (one, other) if one.ulp is not None else (other, one)
    assert decimal.number is not None and exact.number is not None and decimal.ulp is not None
    if has_end(exact.number.denominator) or not has_enough_digits(decimal.number, decimal.ulp):
        return False
    return abs(decimal.number - exact.number) <= decimal.ulp
