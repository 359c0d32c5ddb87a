"""How long a generation may get: the flag, the task's need, and what the server's context leaves."""

from collections.abc import Sequence

from sgl_lim.programs.endpoint import count_tokens, has_token
from sgl_lim.programs.problems import Problem
from sgl_lim.programs.run_options import Options
from sgl_lim.programs.server_stats import ServerState
from sgl_lim.programs.thinking_budget import DEFAULT_END, ThinkingBudget

_MATH_TOKENS = 32768
_NEEDLE_TOKENS = 64
_TEMPLATE_TOKENS = 64  # what a chat template may add to a prompt
_RETOKENIZED = 64  # what a text that was continued may have more tokens than its generations and what was said between


class LimitError(ValueError):
    """The server takes too few tokens; the message names the flag."""


def max_tokens(options: Options, problems: Sequence[Problem], state: ServerState) -> int:
    """The run's `max_new_tokens`.

    Args:
        options: the command line.
        problems: of the whole source: a later run with another `--limit` must come to the same number.
        state: of the server, which may say how many tokens it takes for a prompt and its generation.

    Raises:
        LimitError: the longest prompt and what was asked for do not fit.
    """
    context, wanted = state.max_input_tokens, options.max_tokens
    if wanted is None and options.chains is not None:
        wanted = _chain_tokens(options, problems[0])
    elif wanted is None and options.needles is not None:
        wanted = _NEEDLE_TOKENS
    if context is None:
        return wanted or _MATH_TOKENS
    longest = _longest_prompt(options, problems, exact_only=wanted is not None)
    if longest is None:
        return wanted or _MATH_TOKENS
    room = context - longest
    if room < (wanted or 1):
        flag = _flag_of_size(options)
        raise LimitError(
            f"{flag}: the longest prompt has {longest} tokens and its generation may take {wanted or 1}, but the "
            f"server takes {context} for both; start it with a larger {state.limited_by}, or ask for less"
        )
    return wanted or min(_MATH_TOKENS, room)


def _flag_of_size(options: Options) -> str:
    """What to lower where a problem is too long."""
    if options.max_tokens:
        return "--max-tokens"
    if options.chains:
        return "--steps/--facts"
    return "--sentences" if options.needles else "--problems"


def _chain_tokens(options: Options, first: Problem) -> int:
    """Tokens that a chain's solution takes: a token a word, or more by the server's tokenizer.

    By the first problem alone, and with an eighth to spare for the others: how many are asked must not matter.
    """
    words = 8 * options.steps + 3  # the last is what ends the text, or a special token in front
    counts = count_tokens(options.endpoint, [first.solution or ""], api_key=options.api_key)
    spared = words + 5
    return spared if counts is None or counts[0] <= words else max(spared, counts[0] + counts[0] // 8)


def check_tree(options: Options, tokens: int) -> None:
    """Whether thoughts leave room for an answer within `tokens`, the run's `max_new_tokens`.

    Raises:
        LimitError: they do not.
    """
    tree = options.tree
    if tree is not None and tree.path_tokens >= tokens:
        raise LimitError(
            f"--thought-tokens: {tree.depth} rounds of {tree.thought_tokens} tokens leave nothing of the {tokens} that "
            "a generation may have, thoughts and answer together; lower it or --depth, or raise --max-tokens"
        )


def thinking_end(options: Options) -> str:
    """What ends the thinking of budget forcing: as the flag says, or by the server's tokenizer.

    Raises:
        LimitError: the server cannot say.
    """
    assert options.forcing is not None
    if options.forcing.thinking_end is not None:
        return options.forcing.thinking_end
    known = has_token(options.endpoint, DEFAULT_END, api_key=options.api_key)
    if known is None:
        raise LimitError(
            f"--thinking-end: the server does not say whether its tokenizer has {DEFAULT_END}; name what ends its "
            "model's thinking, or '' if nothing does but the end of the generation"
        )
    return DEFAULT_END if known else ""


def thinking_budget(options: Options, end: str, tokens: int) -> ThinkingBudget:
    """Budget forcing within `tokens`, the run's `max_new_tokens`.

    Raises:
        LimitError: the thinking leaves no room for an answer.
    """
    forcing = options.forcing
    assert forcing is not None
    most = tokens - max(1, tokens // 8) if forcing.max_thinking is None else forcing.max_thinking
    least = most if forcing.min_thinking is None else forcing.min_thinking
    if not 0 < most < tokens or least > most:
        flag = "--min-thinking" if forcing.max_thinking is None and forcing.min_thinking else "--max-thinking"
        raise LimitError(
            f"{flag}: thinking of {max(least, most)} tokens leaves too little of the {tokens} that a generation may "
            "have, thinking and answer together; lower it, or raise --max-tokens"
        )
    return ThinkingBudget(least, most, forcing.waits, forcing.wait_text, forcing.final_text, end)


def _said(options: Options) -> list[str]:
    """What budget forcing may add to a generation, which its context must hold as well."""
    forcing = options.forcing
    if forcing is None:
        return []
    end = DEFAULT_END if forcing.thinking_end is None else forcing.thinking_end
    return [*[forcing.wait_text] * forcing.waits, f"\n{end}{forcing.final_text}"]


def _longest_prompt(options: Options, problems: Sequence[Problem], *, exact_only: bool) -> int | None:
    """Tokens of the longest prompt and of what is said later.

    If the server cannot count, bytes bound it from above, or it is None if `exact_only`.
    """
    prompts, said = [problem.prompt for problem in problems], _said(options)
    counts = count_tokens(options.endpoint, [*prompts, *said], api_key=options.api_key)
    if counts is None:
        if exact_only:
            return None
        counts = [len(text.encode()) for text in [*prompts, *said]]
    added = (_TEMPLATE_TOKENS if options.chat else 0) + (sum(counts[len(prompts) :]) + _RETOKENIZED if said else 0)
    return max(counts[: len(prompts)]) + added
