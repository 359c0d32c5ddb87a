"""The forms in which models write an answer, put into those that math-verify reads. Each rule says what was reported.

Math-verify reads LaTeX in a few spellings, and compares with fewer of them exactly. All that is ours stands in front
of it: here for texts, in `math_worker` for the comparison. Numbers refer to issues of huggingface/Math-Verify.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from sgl_lim.programs.answer_text import closing_brace

# Report: "the answer holds invisible, full-width, bold or other Unicode characters, and counts as wrong".
_CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63", "-"),
        **dict.fromkeys("\u2018\u2019\u2032", "'"),
        "×": r" \times ", "·": r" \cdot ", "÷": r" \div ", "√": r" \sqrt ", "π": r" \pi ", "θ": r" \theta ",
        "∞": r" \infty ", "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "∪": r" \cup ", "∩": r" \cap ",
        "∈": r" \in ", "±": r" \pm ", "∓": r" \mp ",
        **{power: f"^{{{digit}}}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{index: f"_{{{digit}}}" for digit, index in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        "°": r"^\circ", "∅": r"\emptyset ", "、": ",", "…": r"\ldots ", "∶": ":", "∕": "/", "⁄": "/",
    }
)  # fmt: skip

# Report: "bold, coloured or sized answers count as wrong"; what stands in the braces is kept.
_WRAPPERS = (
    r"boxed|fbox|framebox|boldsymbol|mathbf|mathbfit|bm|pmb|textbf|textit|emph|underline|ensuremath|mathit|mathsf|mathtt|"
    r"textsf|texttt|mathrm|textrm|textnormal|mathnormal|mbox|hbox|text|operatorname|mathop|textup|mathbin"
)
_WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\*?\s*(?=\{{)")
_WORD_WRAPPERS = re.compile(r"\\(?:text|mathrm|textrm|textnormal|mbox|hbox|operatorname|textup|textit|textbf)\b")
_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox|definecolor)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}")
_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|bf|bfseries|rm|it|tiny|small|normalsize|"
    r"large|Large|LARGE|huge|Huge|centering|mathstrut|strut|nonumber|notag|unicode)(?![A-Za-z])\.?"
)
# Report: "spaces in an answer make it another one".
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!> ]|~|\\(?:q?quad|thinspace|medspace|thickspace|enspace|nobreak)(?![A-Za-z])"
    r"|\\h(?:space|phantom)\s*\{[^{}]*\}|\s+"
)
# Report: "bold Markdown, choices and dollars count as wrong".
_MARKDOWN = re.compile(r"^\s*(?:\*\*|__)(.*?)(?:\*\*|__)\s*$")
_CHOICE = re.compile(r"\(?([A-J])\)(?:\s*:?\s*(?:\\unit\s)?\s*(.+))?")
_DOLLARS = re.compile(r"\s*\$?\s*\\\$")
# Report: "a remark in the box counts as wrong": \text{The answer is } 9, 9 (nine), 9 with a tick.
_REMARKS = re.compile(
    r"^\s*(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is)?\s*:?\s+(?=\S)"
    r"|(?<=\d)\s*(?:\\unit\s*)?\([A-Za-z]{3,}[A-Za-z\s]*\)\s*$|\\(?:checkmark|blacksquare|square|qed)(?![A-Za-z])|[✓✔✅■∎]",
    re.IGNORECASE,
)
# Report: "12 percent is not 12%", and "other names of one command, such as \dfrac and \langle, are not read".
_PERCENT = re.compile(r"\s+per\s?cent\b|(?<=\d)\s*%", re.IGNORECASE)
_BRACKETS = {"langle": "(", "rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]"}
_BRACKET = re.compile(rf"\\({'|'.join(_BRACKETS)})(?![A-Za-z])")
_DOTS = re.compile(r"\\[cl]?dots[cob]?(?![A-Za-z])|\.\.\.")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_RELATIONS = re.compile(r"\\(le|ge|ne)(?:q|qslant)(?![A-Za-z])")
# Report: "1{,}000, 1\,000 and 1,000 are not 1000"; a comma in brackets parts elements.
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")
_JOINED = re.compile(r"(?<=\d)(?:\{,\}\s*|,\\!\s*)(?=\d{3})")
# Report: "pi/2, sqrt(3) and infinity count as wrong"; "1e-7 is e - 7"; "x \in [1, 2] is not [1, 2]".
_PLAIN_WORDS = re.compile(
    r"(?<![\\A-Za-z])(?:sqrt|pi|theta|alpha|beta|gamma|lambda|phi|infinity|infty|inf|oo|sin|cos|tan|cot|sec|csc|ln|log)"
    r"(?![A-Za-z])"
)
_SCIENTIFIC = re.compile(r"^([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)$")
_COMMAND_OF = {"infinity": "infty", "inf": "infty", "oo": "infty"}
_MEMBER = re.compile(r"^\s*(?:[A-Za-z]|\\[a-z]+)\s*\\in(?![a-z])\s*")
_NAMED = re.compile(r"^\s*((?:[A-Za-z]|\\[A-Za-z]+)[\w{}'\\]*(?:\s*\([A-Za-z,\s]*\))?)\s*=\s*([^=<>]*)$")
_BASED = re.compile(
    r"\(?([0-9A-Za-z]+)\)?\s*(?:_\s*\{?\s*(?:base)?\s*([A-Za-z]+|\d+)\s*\}?"
    r"|\s+(?:\\unit\s*)?\(?(?:in\s+)?base[\s-]+(\w+)\)?)"
)
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "mile": "mi",
    "yard": "yd", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week",
    "month": "month", "year": "year", "degree": "degree", "deg": "degree", "radian": "rad", "dollar": "dollar",
    "usd": "dollar", "cent": "cent", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l",
    "pound": "lb", "ounce": "oz", "kph": "km/h", "mph": "mi/h",
}  # fmt: skip
_KNOWN_UNITS = frozenset([*_UNITS.values(), "am", "pm", "n", "j", "w", "v", "k", "c", "f"])
_SHORT_UNITS = r"cm|mm|km|ft|in|kg|mi|yd|lb|oz|mph|hr|min|sec|deg|sq|cu"
_POWER = r"(?:\s*\^\s*\{?[23]\}?)?"
# Report: "a unit behind the number counts as wrong": words in a wrapper, known or long words without one, degrees.
_UNIT = re.compile(
    r"(?<=[\d})a-z%])\s*("
    rf"\\unit\s*[A-Za-z][A-Za-z .\-/]*(?:/\s*\\unit\s*[A-Za-z]+)?{_POWER}"
    rf"|(?:\s|(?<=\d))(?:{_SHORT_UNITS})\b[A-Za-z .\-/]*{_POWER}|\s(?:per\s+)?[A-Za-z]{{4,}}[A-Za-z .\-/]*{_POWER}"
    r"|\s(?:m|ft|km|mi|cm|g|kg)\s*/\s*(?:s|h|hr|min|L|l|ml)(?:\s*\^\s*\{?2\}?)?|\s[ms]\s*\^\s*\{?[23]\}?"
    r"|\^\s*\{?\\circ\}?(?:\s*(?:\\unit)?\s*[CF])?)\s*$"
)
_BEFORE_UNIT = re.compile(r"[\dA-Za-z})\]%](?:\\[,;:! ]|[\s~])*$")
_LETTER_UNIT = re.compile(
    r"(?<=[\d}/])((?:\\[,; ]|~|\s)*)\\(?:text|mathrm|mbox|textrm)\s*\{(?:\\[,; ]|~|\s)*([mgshLlNJWVKCF])\s*\}"
)
_NO_UNITS = re.compile(r"\b(?:or|and|mod|if|for|where|not|base|to)\b|\\")
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d*\.?\d+|\d+\.)\s*(?:(?:\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?\s*(\\?%)?"
)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_RATIO = re.compile(
    r"([-+]?)\s*(?:\\frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|(\d+)\s*/\s*(\d+))"
)
_LONGEST = 1000  # characters of an answer that is read; a longer one is compared by its spelling


@dataclass(frozen=True)
class Form:
    """An answer as it is compared."""

    text: str
    """LaTeX for math-verify, without what is not mathematics; also what people read."""
    unit: str | None = None  # "cm^2", where the answer has one
    name: str | None = None  # "x" of `x = 5`
    base: int | None = None  # of a numeral with a subscript
    number: Fraction | None = None  # the value of a plain number or fraction
    ulp: Fraction | None = None  # the last place of a `number` with a decimal point, which may be rounded there
    percent: bool = False
    choice: str | None = None  # "B" of `(B) 42`

    @property
    def as_equation(self) -> str:
        """LaTeX with its name as the left side."""
        return self.text if self.name is None else f"{self.name} = {self.text}"

    @property
    def spelling(self) -> str:
        """Equal of answers that differ in nothing but spaces and capital letters of words."""
        letters = re.sub(r"(?<!\d)\s|\s(?!\d)", "", self.text)
        return letters.casefold() if re.search(r"[A-Za-z]{3}", self.text) else letters


def read(answer: str) -> Form:
    """The form of an answer; its text is empty if there is nothing in the answer."""
    if len(answer) > _LONGEST:
        return Form(" ".join(answer.split()))
    text = _mathematics(answer)
    based = _BASED.fullmatch(text)
    if based and (numeral := _numeral(based.group(1), based.group(2) or based.group(3))):
        return numeral
    choice, text = _choice(text)
    name, text = _name(text)
    unit, text = _unit(text)
    if _DOLLARS.match(answer):
        unit = unit or "dollar"
    return _plain(Form(text, unit, name, choice=choice))


def _mathematics(answer: str) -> str:
    """`answer` without dress: characters, wrappers, spaces, final marks, words of mathematics."""
    text = _MARKDOWN.sub(r"\1", "".join(map(_character, answer)).translate(_CHARACTERS))
    text = _LETTER_UNIT.sub(r" \\unit \2", _SIZES.sub(" ", _COLOUR.sub("", text)))
    text = re.sub(r"\\(?:\(|\)|\[|\])|(?<!\\)\$|`", " ", text)
    text = _PERCENT.sub(r"\\%", text.replace(r"\$", ""))  # report: "$36 and 36 dollars are not 36"
    text = _unwrap(text)
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _DOTS.sub(r"\\ldots ", _FRACTIONS.sub(r"\\frac", text))
    text = _BRACKET.sub(lambda bracket: _BRACKETS[bracket.group(1)], text)
    text = _JOINED.sub("", _RELATIONS.sub(r"\\\1", text))
    text = _SPACES.sub(" ", text)
    if not re.search(r"[(\[]|\\\{", text):
        text = _GROUPED.sub(lambda number: re.sub(r"[^\d]", "", number.group()), text)
    text = re.sub(r"\{\s*(-?[\w.]+)\s*\}$", r"{\1}", text.strip())
    return _plain_words(_final_marks(_REMARKS.sub("", text)))


def _character(character: str) -> str:
    """Nothing for invisible ones, ASCII for digits and letters of other styles."""
    if unicodedata.category(character) == "Cf":
        return ""
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.digit(character))
    if 0x1D400 <= ord(character) <= 0x1D7FF:
        return unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", character).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return character


def _unwrap(text: str) -> str:
    """What stands in the braces of wrappers; words behind something are marked, for they may be its unit."""
    position = 0
    while wrapper := _WRAPPED.search(text, position):
        end = closing_brace(text, wrapper.end())
        if end is None:
            position = wrapper.end()
            continue
        content = text[wrapper.end() + 1 : end]
        if _WORD_WRAPPERS.match(wrapper.group()) and len(re.findall(r"[A-Za-z]", content)) > 1:
            content = f" \\unit {content} " if _BEFORE_UNIT.search(text[: wrapper.start()]) else f" {content} "
        position = wrapper.start()
        text = text[:position] + content + text[end + 1 :]
    return text


def _final_marks(text: str) -> str:
    """Report: "a dot or a comma at the end of the box counts as wrong"; also braces and signs around the whole."""
    previous = None
    while previous != text:
        previous = text
        text = re.sub(r"^(?:[=:]|\\(?:approx|therefore)(?![A-Za-z]))\s*|(?<!\\)\\$|[\s.,;:?。]+$", "", text.strip())
        if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
    return text


def _plain_words(text: str) -> str:
    """Report: "pi/2, sqrt(3) and 2*x count as wrong": the commands of mathematics without their backslash."""
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)(?=(?:sqrt|pi)(?![A-Za-z]))", " ", text)
    text = _PLAIN_WORDS.sub(lambda word: f"\\{_COMMAND_OF.get(word.group(), word.group())} ", text)
    text = re.sub(r"(?<![A-Za-z])\\?exp\s*\(([^()]*)\)", r"e^{\1}", text)
    text = re.sub(r"\*\*|\^\^", "^", text)
    text = text.replace("*", r" \cdot ").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", text)
    text = re.sub(
        r"\s*,?\s+(?:\\unit\s+)?(?:and|or)\s+", ", ", text
    )  # report: "19, 46 and 82 equals 21, 36 and 82" (#14)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    return _MEMBER.sub("", re.sub(r"\s+", " ", text).strip())


def _name(text: str) -> tuple[str | None, str]:
    """Report: "x = 5 is not 5", and "n = 2, 3 equals n = 1, 2" (#14): the name before the value, and the value."""
    named = _NAMED.match(text)
    if named is None or named.group(1).count("{") != named.group(1).count("}"):
        return None, text  # the equals sign stands in an index, as that of a sum
    return re.sub(r"\s", "", named.group(1)), named.group(2).strip()


def _choice(text: str) -> tuple[str | None, str]:
    """Report: "(B) is not B, and (B) 42 is neither": the letter of a choice, and what it stands for."""
    found = _CHOICE.fullmatch(text)
    return (None, text) if found is None else (found.group(1), found.group(2) or found.group(1))


def _unit(text: str) -> tuple[str | None, str]:
    """The unit, if it is a known one, and the text without it."""
    found = _UNIT.search(text)
    words = "" if found is None else found.group(1).replace(r"\circ", "").replace(r"\unit", "")
    text = text.replace(r"\unit ", "") if found is None or _NO_UNITS.search(words) else text[: found.start()].strip()
    if found is None or _NO_UNITS.search(words):
        return None, re.sub(r"\s+", " ", text)
    words = re.sub(r"[{}\s.]+", " ", words).strip().lower()
    if words.startswith("^"):
        return "degree", text
    power = "^2" if re.search(r"square|sq\b|\^ ?2", words) else "^3" if re.search(r"cubic|cu\b|\^ ?3", words) else ""
    word = re.sub(r"square|cubic|\bsq\b|\bcu\b|\^ ?\d", "", words).strip()
    word = _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or word.replace(" ", "")
    return (word + power if word in _KNOWN_UNITS or "/" in word else None), text


def _numeral(digits: str, named: str) -> Form | None:
    """Report: "4210_6 equals 4210_5": a numeral with its base; None if the subscript is another thing."""
    word = named.lower()
    base = int(named) if named.isdecimal() and len(named) < 3 else _BASES.index(word) + 2 if word in _BASES else 0
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    digits = digits.upper().lstrip("0") or "0"
    return _plain(Form(digits)) if base == 10 else Form(f"{digits}_{{{base}}}", base=base)


def _plain(form: Form) -> Form:
    """Report: "1/2^99 equals 1/2^98", "0.0000001 equals 0.0000002" (#14): plain numbers are compared exactly."""
    text = form.text
    if found := _DECIMAL.fullmatch(text):
        return _decimal(form, *found.groups())
    if found := _REPEATING.fullmatch(text):  # report: "0.333... with a bar is not 1/3"
        sign, whole, once, again = found.groups()
        number = Fraction(f"{whole}.{once}0") + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        return replace(form, number=-number if sign == "-" else number)
    if found := _RATIO.fullmatch(text):
        sign, *parts = found.groups()
        above, below = [part for part in parts if part is not None]
        if int(below):
            number = Fraction(int(above), int(below))
            return replace(form, number=-number if sign == "-" else number)
    return form


def _decimal(form: Form, sign: str, digits: str, exponent: str | None, percent: str | None) -> Form:
    number, text = Fraction(f"{sign}{digits}e{exponent or 0}"), form.text
    if digits.isdecimal() and not exponent:
        text = f"{number}{percent or ''}"  # without leading zeros
    places = Fraction(10) ** (int(exponent or 0) - len(digits.partition(".")[2]))
    ulp = places if "." in digits else None
    return replace(form, text=text, number=number, ulp=ulp, percent=bool(percent))
