"""Units behind a number, known and unknown ones. Each rule says what was reported."""

import re

from sgl_lim.programs.answer_latex import OF_ANGLES

_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "mile": "mi",
    "yard": "yd", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week",
    "month": "month", "year": "year", "degree": "degree", "deg": "degree", "radian": "rad", "dollar": "dollar",
    "usd": "dollar", "cent": "cent", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l",
    "pound": "lb", "ounce": "oz", "kph": "km/h", "mph": "mi/h",
}  # fmt: skip
_KNOWN = frozenset([*_UNITS.values(), "am", "pm", "n", "j", "w", "v", "k", "c", "f"])
_SHORT = r"cm|mm|km|ft|in|kg|mi|yd|lb|oz|mph|hr|min|sec|deg|sq|cu"
_POWER = r"(?:\s*\^\s*\{?[23]\}?)?"
# Report: "a unit behind the number counts as wrong": words in a wrapper, known or long words without one, degrees.
_UNIT = re.compile(
    r"(?<=[\d})a-z%])\s*("
    rf"\\unit\s*[A-Za-z][A-Za-z .\-/]*(?:/\s*\\unit\s*[A-Za-z]+)?{_POWER}"
    rf"|(?:\s|(?<=\d))(?:{_SHORT})\b[A-Za-z .\-/]*{_POWER}|\s(?:per\s+)?[A-Za-z]{{4,}}[A-Za-z .\-/]*{_POWER}"
    r"|\s(?:[ap]\.?m\b\.?|[AP]\.?M\b\.?)"
    r"|\s(?:m|ft|km|mi|cm|g|kg)\s*/\s*(?:s|h|hr|min|L|l|ml)(?:\s*\^\s*\{?2\}?)?|\s[ms]\s*\^\s*\{?[23]\}?"
    r"|\^\s*\{?\\circ\s*\}?(?:\s*(?:\\unit)?\s*[CF])?)\s*$"
)
# Report: "5 squared, 5 times six and 6 less than x are 5": words that compute or say something are no unit.
_NO_UNITS = re.compile(
    r"\b(?:or|and|mod|if|for|where|not|base|to|is|are|was|has|squared|cubed|factorial|plus|minus|doubled|tripled|over|"
    r"inverse|remainder|negative|below|at least|at most|except|approximately|root|"
    r"thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|(?:hundred|thousand|[a-z]+illion|lakh|crore)s?|"
    r"times(?! (?:as|more|a|per)\b)\s+\S+|"
    r"(?:less|more|greater|fewer) than)"
    r"\b|\\",
    re.IGNORECASE,
)
# Report: "two real roots equals two complex roots": a unit belongs to a number or a letter, and not to words.
_COUNTED = re.compile(r"\d|\\(?!unit)")
_LETTERS = re.compile(r"(?:[^A-Za-z]*[A-Za-z]{1,2}(?![A-Za-z]))+[^A-Za-z]*")
# Report: "5 million is 5".
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?:\\unit\s*)*\b({'|'.join(_SCALES)})s?\b\s*", re.IGNORECASE)
_SCALED = re.compile(rf"(?<=[\d}}])\s*((?:{_SCALE.pattern})+)", re.IGNORECASE)


def scaled(text: str) -> str:
    """`text` with a power of ten for million and its like; words behind it may be a unit."""

    def power(words: re.Match[str]) -> str:
        zeros = sum(_SCALES[word.group(1).lower()] for word in _SCALE.finditer(words.group(1)))
        return rf" \times 10^{{{zeros}}} \unit "

    return re.sub(r"\s*(?:\\unit\s*)+$", "", re.sub(r"(?:\\unit\s*)+", r"\\unit ", _SCALED.sub(power, text)))


def split_unit(text: str) -> tuple[str | None, str]:
    """The unit, if it is a known one, and the text without it."""
    plain = re.sub(r"\s+", " ", text.replace(r"\unit ", ""))
    found = _UNIT.search(text)
    words = "" if found is None else found.group(1).replace(r"\circ", "").replace(r"\unit", "")
    if found is None or _NO_UNITS.search(words):
        return None, plain
    counted = text[: found.start()].strip()
    words = re.sub(r"[{}\s.]+", " ", words).strip().lower()
    if words.startswith("^"):
        # The degree may be an angle's, of which the text has a function.
        return (None, plain) if OF_ANGLES.search(counted) else ("degree", counted)
    power = "^2" if re.search(r"square|sq\b|\^ ?2", words) else "^3" if re.search(r"cubic|cu\b|\^ ?3", words) else ""
    word = re.sub(r"square|cubic|\bsq\b|\bcu\b|\^ ?\d", "", words).strip()
    word = _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or word.replace(" ", "")
    known = word in _KNOWN or "/" in word
    # A letter counts what is known to be counted. Behind one, other words may say something.
    letters = r"\unit" in found.group(1) and _LETTERS.fullmatch(counted) and (known or word in ("unit", "units"))
    if not _COUNTED.search(counted) and not letters:
        return None, plain
    return (word + power if known else None), counted
