"""The forms in which models write an answer, put into those that math-verify reads. Each rule says what was reported.

Math-verify reads LaTeX in a few spellings, and compares with fewer of them exactly. All that is ours stands in front
of it: here for texts, in `math_worker` for the comparison. Numbers refer to issues of huggingface/Math-Verify.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from sgl_lim.programs.answer_latex import close_spaced_roots, display_math, residue, usual_commands
from sgl_lim.programs.answer_text import closing_brace
from sgl_lim.programs.answer_units import scaled, split_unit

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
_CHOICE = re.compile(r"\(?([A-J])\)(?:\s*:?\s*(?:\\unit\s)?\s*(?![,;])(.+))?|([A-J])[.:]\s+(.+)")
_OTHER_CHOICE = re.compile(r"(?:^|[,;\s])\(?[A-J](?:[).:]|\s|$)|^[A-Za-z]+$")
_CHOSEN = re.compile(r"^\s*(?:option|choice)\s+(?=\(?[A-J]\b)", re.IGNORECASE)
_DOLLARS = re.compile(r"\s*\$?\s*\\\$")
# Report: "a remark in the box counts as wrong": \text{The answer is } 9, 9 (nine), 9 with a tick.
_REMARKS = re.compile(
    r"^\s*(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is)?\s*:?\s+(?=\S)"
    r"|(?<=[\d}])(?:\s+|\s*\\unit\s*)\((?!not|reject|wrong|exclud|sin|cos|tan|log|ln|sqrt)"
    r"(?:[A-Za-z]{3,}[A-Za-z\s-]*|(?:since|because)\b[^()]*)\)\s*$"
    r"|\\(?:checkmark|blacksquare|square|qed)(?![A-Za-z])|[✓✔✅■∎]",
    re.IGNORECASE,
)
# Report: "12 percent is not 12%".
_PERCENT = re.compile(r"\s+per\s?cent\b|(?<=\d)\s*%", re.IGNORECASE)
# Report: "1{,}000, 1\,000 and 1,000 are not 1000"; a comma in brackets parts elements.
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
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
# Report: "f(2) = 7, \gcd(24, 36) = 12 and minimum value = 2 are not 7, 12 and 2"; x(x - 3) = 0 stays an equation.
_VALUE_OF = re.compile(
    r"\s*(?:\\(?:gcd|lcm)|lcm|gcd|det|rank|arg)\s*\([^=<>()]*\)\s*=\s*([^=<>]*)"
    r"|\s*\\(?:lim(?![A-Za-z])[^=<>]*|(?:det|min|max|inf|sup|deg|dim)(?![A-Za-z])[^=<>+\-]*)=\s*([^=<>]*)"
)
_CALL = r"(?:[fghpqFGHPQT]|\\Pr)(?:\^\{?-1\}?)?'*\s*\("
_CALLED = re.compile(rf"\s*({_CALL}[^=<>]*\))\s*=\s*([^=<>]*)")
_INNER_CALL = re.compile(rf"{_CALL}[^()]*\)")
_WORDS_FOR = re.compile(r"^\s*([A-Za-z]{3,}(?:\s+(?:\\unit\s+)?[A-Za-z]+)*)\s*=\s*([^=<>]*)$")
_TURNED = re.compile(r"^((?:\\(?:frac|sqrt|pi|cdot|times|binom|ln|log)(?![A-Za-z])|[^A-Za-z=<>,\\])+)=\s*([A-Za-z])$")
_COORDINATE = re.compile(r"\s*([xyz])\s*=\s*([^=<>]+)")
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[A-Za-z]{3,}[A-Za-z' -]*$)", re.IGNORECASE)
# Report: "all real numbers is not \mathbb{R}".
_ALL_REALS = re.compile(r"^(?:all\s+reals?(?:\s+numbers?)?|\\mathbb\s*\{?\s*R\s*\}?|\\R)$", re.IGNORECASE)
_ORDINAL = re.compile(r"(?<=\d)(?<!\^\d)\s*(?:\^\s*)?\{?\s*(?:\\unit\s*)?(?:st|nd|rd|th)\s*\}?$")
_BASED = re.compile(
    r"\(?([0-9A-Za-z]+)\)?\s*(?:_\s*\{?\s*\(?(?:base)?\s*([A-Za-z]+|\d+)\s*\)?\s*\}?"
    r"|\s+(?:\\unit\s*)?\(?(?:in\s+)?base[\s-]+(\w+)\)?)"
)
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_BEFORE_UNIT = re.compile(r"[\dA-Za-z})\]%](?:\\[,;:! ]|[\s~])*$")
_LETTER_UNIT = re.compile(
    r"(?<=[\d}/])((?:\\[,; ]|~|\s)*)\\(?:text|mathrm|mbox|textrm)\s*\{(?:\\[,; ]|~|\s)*([mgshLlNJWVKCF])\s*\}"
)
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d*\.?\d+|\d+\.)\s*(?:(?:\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?)?\s*(\\?%)?"
)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_RATIO = re.compile(r"([-+]?)\s*(?:\\frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))")
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
    modulus: int | None = None  # 7 of `3 (mod 7)`
    listed: str | None = None  # "100, 200" of `100,200`, which may also be one number

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
    if not _GROUPED.search(text) or re.search(r"[(\[]|\\\{", text):
        return _form(answer, text)
    joined = _GROUPED.sub(lambda number: re.sub(r"[^\d]", "", number.group()), text)
    listed = text.replace(",", ", ") if re.fullmatch(r"-?\d+(?:,\d+)+", text) else None
    return replace(_form(answer, joined), listed=listed)


def _form(answer: str, text: str) -> Form:
    """The form of the mathematics of an answer."""
    based = _BASED.fullmatch(text)
    if based and (numeral := _numeral(based.group(1), based.group(2) or based.group(3))):
        return numeral
    choice, text = _choice(text)
    text, modulus, variable = residue(_in_order(text))
    name, text = _name(text)
    unit, text = split_unit(scaled(text))
    if _DOLLARS.match(answer):
        unit = unit or "dollar"
    text = _ALL_REALS.sub(r"(-\\infty, \\infty)", _ARTICLE.sub("", text))
    return _plain(Form(text, unit, name or variable, choice=choice, modulus=modulus))


def _mathematics(answer: str) -> str:
    """`answer` without dress: characters, wrappers, spaces, final marks, words of mathematics."""
    text = _MARKDOWN.sub(r"\1", "".join(map(_character, answer)).translate(_CHARACTERS))
    text = _LETTER_UNIT.sub(r" \\unit \2", _SIZES.sub(" ", _COLOUR.sub("", display_math(text))))
    text = re.sub(r"\\(?:\(|\)|\[|\])|(?<!\\)\$|`", " ", text)
    text = _PERCENT.sub(r"\\%", text.replace(r"\$", ""))  # report: "$36 and 36 dollars are not 36"
    text = _SPACES.sub(" ", _JOINED.sub("", usual_commands(_unwrap(text))))
    text = re.sub(r"\{\s*(-?[\w.]+)\s*\}$", r"{\1}", re.sub(r"\{\s*([-+])\s*\}", r"\1", text.strip()))
    text = _CHOSEN.sub("", _ORDINAL.sub("", re.sub(r"^negative\s+(?=\d)", "-", text)))
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
    text = close_spaced_roots(text)
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
    if turned := _TURNED.match(text):
        return turned.group(2), turned.group(1).strip()
    if words := _WORDS_FOR.match(text):
        return re.sub(r"\\unit|\s", "", words.group(1)).casefold(), words.group(2).strip()
    if value := _VALUE_OF.fullmatch(text):
        return None, (value.group(1) or value.group(2)).strip()
    if (called := _CALLED.fullmatch(text)) and _is_call(called.group(1)):
        return re.sub(r"\s", "", called.group(1)), called.group(2).strip()
    named = _NAMED.match(text)
    if named is None or named.group(1).count("{") != named.group(1).count("}"):
        return None, text  # the equals sign stands in an index, as that of a sum
    return re.sub(r"\s", "", named.group(1)), named.group(2).strip()


def _is_call(text: str) -> bool:
    """Whether `text` is one function of a number, of another call, or the probability of events; no product."""
    opening = text.index("(")
    if closing_brace(text, opening, "()") != len(text) - 1:
        return False
    argument = text[opening + 1 : -1]
    while _INNER_CALL.search(argument):
        argument = _INNER_CALL.sub("1", argument)
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", argument)))
    return not letters or (text[0] in "P\\" and "".join(letters).isupper())


def _in_order(text: str) -> str:
    """Report: "y = 3, x = 4 equals (3, 4)": values of different names, by their names."""
    found = [_COORDINATE.fullmatch(part) for part in text.split(",")]
    names = [part.group(1) for part in found if part is not None]
    if len(names) < max(2, len(found)) or len(set(names)) < len(names):
        return text
    return ", ".join(part.group().strip() for part in sorted(filter(None, found), key=lambda part: part.group(1)))


def _choice(text: str) -> tuple[str | None, str]:
    """Report: "(B) is not B, and (B) 42 is neither": the letter of a choice, and what it stands for."""
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None, text
    letter, meaning = found.group(1) or found.group(3), found.group(2) or found.group(4)
    if meaning and _OTHER_CHOICE.search(meaning):
        return None, text
    return letter, meaning or letter


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
    if re.fullmatch(r"[^%,]+\\%", text):  # report: "33\frac13\% is not \frac{100}{3}\%"
        bare = _plain(replace(form, text=text[:-2].strip()))
        return replace(bare, percent=True)
    if found := _REPEATING.fullmatch(text):  # report: "0.333... with a bar is not 1/3"
        sign, whole, once, again = found.groups()
        repeated = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        return _signed(form, sign, Fraction(f"{whole}.{once}0") + repeated)
    sign, *parts = found.groups() if (found := _RATIO.fullmatch(text) or _MIXED.fullmatch(text)) else ("",)
    numbers = [int(part) for part in parts if part is not None]
    if not numbers or not numbers[-1]:
        return form
    *whole_part, above, below = numbers
    if whole_part:
        form = replace(form, text=rf"{sign}{whole_part[0]}\frac{{{above}}}{{{below}}}")
    return _signed(form, sign, sum(whole_part) + Fraction(above, below))


def _signed(form: Form, sign: str, number: Fraction) -> Form:
    return replace(form, number=-number if sign == "-" else number)


def _decimal(form: Form, sign: str, digits: str, exponent: str | None, percent: str | None) -> Form:
    number, text = Fraction(f"{sign}{digits}e{exponent or 0}"), form.text
    if digits.isdecimal() and not exponent:
        text = f"{number}{percent or ''}"  # without leading zeros
    places = Fraction(10) ** (int(exponent or 0) - len(digits.partition(".")[2]))
    ulp = places if "." in digits else None
    return replace(form, text=text, number=number, ulp=ulp, percent=bool(percent))
