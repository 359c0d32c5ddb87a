"""Where a generation's thinking ends and its answer begins, by the tags that models have for it.

A tag in the text alone decides nothing: whether the prompt opened the thinking is told (`opened`), because no tag of
it stands in the generation then.
"""

import re

_WORDS = (
    "think|thinking|thinks|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|inner_monologue|"
    "internal_monologue|chain_of_thought|cot"
)
_NAME = rf"(?:[a-z]+[:_])?(?:{_WORDS})(?:_[a-z0-9_]+)?"  # also <seed:think>, <longcat_think>
_OPEN = re.compile(
    rf"<\|?\s*{_NAME}\s*\|?>|\[(?:THINK|THINKING|REASONING)\]|<\|(?:begin_of_thought|start_thinking)\|>|◁think▷"
    r"|<\|channel\|>\s*analysis\s*<\|message\|>|<\|channel>thought\b|<unused94>(?:thought)?",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"<\|?/\s*{_NAME}\s*\|?>|\[/(?:THINK|THINKING|REASONING)\]|<\|(?:end_of_thought|end_thinking)\|>|◁/think▷"
    r"|<\|channel\|>\s*final\s*<\|message\|>|<channel\|>|<unused95>",
    re.IGNORECASE,
)
_LONGEST = 100  # characters of a tag
SPECIAL_TOKENS = re.compile(r"<\|[^<>|]*\|>|</?s>|<(?:eos|bos|end_of_turn)>", re.IGNORECASE)


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends with a tag that opens the thinking, as some models' templates do."""
    end = prompt.rstrip()[-_LONGEST:]
    return any(tag.end() == len(end) for tag in _OPEN.finditer(end))


def after_thinking(text: str, *, opened: bool) -> str | None:
    """What a generation that came to its end says after its thinking; None if the thinking never ended.

    The first tag that closes the thinking ends it, and later stray ones erase nothing. A tag in the midst of a
    sentence is talked about: it opens nothing. Without an opening tag a closing one ends a thinking that the prompt
    opened, unless nothing follows it: then it is stray too.

    Args:
        text: the generation, without its prompt.
        opened: whether the prompt opened the thinking.
    """
    opening = _first_opening(text)
    closing = _CLOSE.search(text)
    if not opened and opening is not None and (closing is None or opening.start() < closing.start()):
        before, text, opened = text[: opening.start()], text[opening.end() :], True
        closing = _CLOSE.search(text)
    else:
        before = ""
    if closing is None:
        return None if opened else before + text
    rest = text[closing.end() :]
    if not opened and not _CLOSE.sub("", SPECIAL_TOKENS.sub("", rest)).strip():
        return text[: closing.start()]
    return _without_more_thinking(rest)


def _first_opening(text: str, position: int = 0) -> re.Match[str] | None:
    """The first opening tag from a position on that begins a line."""
    for tag in _OPEN.finditer(text, position):
        if not text[text.rfind("\n", 0, tag.start()) + 1 : tag.start()].strip():
            return tag
    return None


def _without_more_thinking(text: str) -> str:
    """`text` without further thinking in it: from a tag that begins a line to the one that closes it."""
    kept, position = [], 0
    while (opening := _first_opening(text, position)) and (closing := _CLOSE.search(text, opening.end())):
        kept.append(text[position : opening.start()])
        position = closing.end()
    return "".join([*kept, text[position:]])
