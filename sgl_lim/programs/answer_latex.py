"""Spellings of LaTeX, put into the one that math-verify reads. Each rule says what was reported."""

import re

from sgl_lim.programs.answer_text import closing_brace

_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1}
_TAKES = re.compile(rf"\\({'|'.join(_ARGUMENTS)})(?![A-Za-z])(?:\s*\[[^\[\]]*\])?")
_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9A-Za-z]")
# Report: "\dfrac, \nicefrac and \tbinom are not read".
_OTHER_NAMES = re.compile(r"\\(?:[dtc]|nice|s|x)(frac|binom)(?![A-Za-z])")
_CHOOSE = re.compile(r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}")
_RELATIONS = re.compile(r"\\(le|ge|ne)(?:q|qslant)(?![A-Za-z])")
_BRACKETS = {"langle": "(", "rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]"}
_BRACKET = re.compile(rf"\\({'|'.join(_BRACKETS)})(?![A-Za-z])")
_DOTS = re.compile(r"\\[cl]?dots[cob]?(?![A-Za-z])|\.\.\.")
# Report: "the rows of a matrix are one row": \\[4pt] is a row's end, and \[ is a display's beginning.
_ROW_SPACE = re.compile(r"(\\\\)\s*\[\s*-?[\d.]+\s*\\?[a-z]+\s*\]")
# Report: "42\tag{1}, 42\\ and an aligned 42 are not 42".
_ALIGNED = re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|gather|equation|split|math|displaymath)\*?\}")
_LINE_END = re.compile(r"\\(?:tag|label)\*?\s*\{[^{}]*\}|(?:\\\\\s*)+$")
_DEGREE = re.compile(
    r"\\degree(?![A-Za-z])|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))"
)
# Report: "\sin 30^\circ is not 1/2": without its degrees it is the sine of 30 radians.
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ(?![A-Za-z])")
OF_ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# Report: "699 \pmod{1000} and N \equiv 699 \pmod{1000} are not 699".
_RESIDUE = re.compile(
    r"(?:([A-Za-z])?\s*(\\equiv)\s*)?(-?\d+)\s*(?:\\unit\s*)?\(?\s*(\\[pb]?mod|mod)\s*\{?\s*(\d+)\s*\}?\s*\)?"
)


def display_math(text: str) -> str:
    """`text` without what numbers, lays out or ends displayed lines."""
    lines = _ALIGNED.sub(" ", text)
    if lines != text:
        lines = re.sub(r"(?<!\\)&", " ", lines)
    return _LINE_END.sub(" ", _ROW_SPACE.sub(r"\1 ", lines).rstrip())


def usual_commands(text: str) -> str:
    """One name for each command and bracket, and braces around what a command takes."""
    text = _OTHER_NAMES.sub(r"\\\1", text).replace(r"\varnothing", r"\emptyset")
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _BRACKET.sub(lambda bracket: _BRACKETS[bracket.group(1)], text)
    text = _RELATIONS.sub(r"\\\1", _DOTS.sub(r"\\ldots ", text))
    text = _DEGREE.sub(r"^\\circ ", text)
    if OF_ANGLES.search(text):
        text = _DEGREES.sub(r"{(\1 \\cdot \\frac{\\pi}{180})}", text)
    text = re.sub(r"\\log_\s*\{?e\}?(?![A-Za-z])", r"\\ln ", text)
    text = re.sub(r"\\log_\s?(\d)\s?(\d+(?:\.\d+)?)", r"\\log_{\1}{\2}", text)
    return close_arguments(close_spaced_roots(text))


def close_spaced_roots(text: str) -> str:
    """Report: "√12 is √1 times 2": of a number behind a root and a space, the root is of all its digits."""
    return re.sub(r"\\sqrt\s+(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)


def close_arguments(text: str) -> str:
    r"""Braces around what fractions, binomials and roots take, as TeX takes it: \frac12 is \frac{1}{2}.

    Report: "\frac{\sqrt{5}10}{2} is 0": math-verify's own repair ends a numerator at the first brace that closes.
    """
    # From the last on, because an argument may be another command with its own.
    for command in reversed(list(_TAKES.finditer(text))):
        place = command.end()
        for _ in range(_ARGUMENTS[command.group(1)]):
            place = len(text) - len(text[place:].lstrip())
            end = _end_of_argument(text, place)
            if end is None:
                break
            if text[place] != "{":
                text = f"{text[:place]}{{{text[place:end]}}}{text[end:]}"
                end += 2
            place = end
    return text


def _end_of_argument(text: str, place: int) -> int | None:
    """Where the argument ends that begins at `place`: braces, a digit, a letter, or a command and what it takes."""
    if text[place : place + 1] == "{":
        closing = closing_brace(text, place)
        return None if closing is None else closing + 1
    if command := _TAKES.match(text, place):
        end: int | None = command.end()
        for _ in range(_ARGUMENTS[command.group(1)]):
            end = None if end is None else _end_of_argument(text, end)
        return end
    token = _TOKEN.match(text, place)
    return None if token is None else token.end()


def residue(text: str) -> tuple[str, int | None, str | None]:
    r"""A number with its modulus and variable, as in n \equiv 2 (mod 5); `7 \bmod 5` is what is left of it."""
    found = _RESIDUE.fullmatch(text)
    if found is None or not int(found.group(5)):
        return text, None, None
    number, modulus = int(found.group(3)), int(found.group(5))
    if found.group(4) == r"\bmod" and not found.group(2):
        return str(number % modulus), None, None
    return (str(number), modulus, found.group(1)) if abs(number) < modulus else (text, None, None)
