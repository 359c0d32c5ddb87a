"""Which part of a generation is its answer, as the model wrote it.

In this order: the last box, or `<answer>` tag; without any, the last sentence that states an answer; a bold value in
the last line; a last line that is nothing but a value. Whatever else a generation holds is no answer.
"""

import re

from sgl_lim.programs.thinking_tags import SPECIAL_TOKENS, after_thinking

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:\[[^\[\]]*\]\s*)?")
_TAGGED = re.compile(
    r"<(?:final_)?answer>((?:(?!<(?:final_)?answer>).)*?)</(?:final_)?answer>", re.IGNORECASE | re.DOTALL
)
_ANNOUNCED = re.compile(r"(?:\bis|\bare|\bbe|=|:|\banswer)[\s*$]*$", re.IGNORECASE)
_STATED = re.compile(
    r"\banswer\b(?:\s*\*\*)?(?:[^.\n:=]{0,80}?\s(?:is|are|was|equals|(?:will|must|should) be|comes out to)\b"
    r"|\s*[:=]|[^.\n:=]{0,60}[:=])(?:\s*\*\*)?\s*:?\s*|\bfinal answer\b\**\s*\n\s*|^####\s"
    r"|答案(?:应该)?(?:是|为|[:：])\s*",
    re.IGNORECASE | re.MULTILINE,
)
_REFUSED = re.compile(r"\b(?:not|no|unknown|unclear|impossible to|cannot|can't|could|couldn't|unable|none of)\b", re.I)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$(.+?)\$|\\\((.+?)\\\)", re.DOTALL)
_BOLD = re.compile(r"\*\*(.+?)\*\*|__(.+?)__")
_ENDS = re.compile(r"\n|(?<!\\)[.!?。](?=\s|$)|,?\s(?:because|since|as|which|where|so|and thus|and hence)\s")
_LEAD = re.compile(r"(?:therefore|thus|simply|just|exactly|then|equal to|given by|approximately|about)[\s,:]+", re.I)
_LONGEST = 300  # characters of a value without a box
_SENTENCE = re.compile(r"(?<![\\A-Za-z])(?!(?:pi|sqrt|sin|cos|tan|log|ln|or|and)\b)[A-Za-z]{2,}")
_WORDS = re.compile(r"[^\W\d_]{3,}")
_COMMAND_OR_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_VALUE_START = re.compile(r"[-+\u2212]?\s*[\d.$\\(\[{√π∞]|[A-Za-z]\b|(?:pi|sqrt)\b")


def answer_text(text: str, *, finish_reason: str, thinking_opened: bool) -> str | None:
    """The answer of a generation, or None if it has none.

    A generation that was cut off (`finish_reason` "length") has none, whatever stands in it: it was on its way.

    Args:
        text: the generation, without its prompt.
        finish_reason: why it ended.
        thinking_opened: whether the prompt ended with a tag that opens the thinking.
    """
    if finish_reason == "length":
        return None
    final = after_thinking(text, opened=thinking_opened)
    if final is None:
        return None
    final = _without_end_tokens(final)
    marks = [*_boxes(final), *_tags(final)]
    if marks:
        return max(marks, key=lambda mark: mark[0])[1]
    return _stated(final) or _bold(final) or _alone(final)


def _without_end_tokens(text: str) -> str:
    """Report: "42.<|im_end|> is no answer": `text` without the special tokens that it ends with."""
    end = len(text)
    for token in reversed(list(SPECIAL_TOKENS.finditer(text))):
        if text[token.end() : end].strip():
            break
        end = token.start()
    return text[:end]


def _boxes(text: str) -> list[tuple[int, str | None]]:
    """Position and content of each outermost box; None for one that was not finished, or that announces nothing."""
    found: list[tuple[int, str | None]] = []
    position = 0
    while box := _BOX.search(text, position):
        position = box.end()
        if text[position : position + 1] != "{":
            token = re.compile(r"[0-9A-Za-z]").match(text, position)
            if (token and box.group()[-1].isspace()) or (token and token.group().isdigit()):
                found.append((box.start(), token.group()))  # \boxed 7, as TeX reads it
            continue
        end = closing_brace(text, position)
        content = None if end is None else text[position + 1 : end].strip()
        if content:
            found.append((box.start(), content))
        elif content is None or _ANNOUNCED.search(text[max(0, box.start() - 40) : box.start()]):
            found.append((box.start(), None))  # an empty box elsewhere quotes what the prompt asked for
        position = len(text) if end is None else end + 1
    return found


def closing_brace(text: str, opening: int, pair: str = "{}") -> int | None:
    """Position of the brace, or other bracket of a pair, that closes the one at `opening`; None if none does."""
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == pair[0]:
            depth += 1
        elif text[position] == pair[1]:
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _tags(text: str) -> list[tuple[int, str | None]]:
    """Position and content of each `<answer>` that holds no box."""
    tags = [(tag.start(), tag.group(1).strip()) for tag in _TAGGED.finditer(text)]
    return [
        (start, _stated(content) or _value(content) or content)
        for start, content in tags
        if content and not _BOX.search(content)
    ]


def _stated(text: str) -> str | None:
    """What the last sentence that states an answer says."""
    ends = [statement.end() for statement in _STATED.finditer(text)]
    return _value(text[ends[-1] :]) if ends else None


def _bold(text: str) -> str | None:
    """The last bold value of the last line."""
    lines = text.strip().splitlines()
    spans = [first or second for first, second in _BOLD.findall(lines[-1])] if lines else []
    values = [value for span in spans if _is_value(span) and (value := _value(span))]
    return values[-1] if values else None


def _alone(text: str) -> str | None:
    """The last line, if it is nothing but a value."""
    *_, block = re.split(r"\n\s*\n", text.strip())
    if display := re.fullmatch(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])[\s.]*", block, re.DOTALL):
        return (display.group(1) or display.group(2)).strip()
    line = block.splitlines()[-1] if block else ""
    value = _value(line)
    return value if value and _is_value(value) and len(value) >= len(line.strip(" \t.*_`$\\()[]")) else None


def _value(text: str) -> str | None:
    """The value that `text` begins with: up to the end of its sentence, or of its formula."""
    text = text.strip().lstrip("*_ ").removeprefix("`")
    while lead := _LEAD.match(text):
        text = text[lead.end() :]
    formula = _MATH.match(text)
    if formula:
        return next(part for part in formula.groups() if part is not None).strip() or None
    end = _ENDS.search(text)
    value = (text if end is None else text[: end.start()]).strip().strip("*`").rstrip("_ *`").strip()
    return value if value and not _REFUSED.search(value) else None


def _is_value(text: str) -> bool:
    """Whether `text` is a formula or a number with at most a few words behind it, rather than a sentence."""
    words = _WORDS.findall(_COMMAND_OR_TEXT.sub(" ", text))
    heading = re.match(r"\d+[.)]\s+\D|[^\W\d_]+\s+\d", text)
    if re.match(r"[A-Za-z]", text) and _SENTENCE.search(text):
        return False
    odd = heading or text.endswith(":") or len(text) > _LONGEST or _BOX.search(text)
    return bool(_VALUE_START.match(text)) and len(words) <= 3 and not odd
