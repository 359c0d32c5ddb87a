"""How long a generation may get: the flag, the task's need, and what the server's context leaves."""

from collections.abc import Sequence

from sgl_lim.programs.endpoint import count_tokens
from sgl_lim.programs.options import Options
from sgl_lim.programs.problems import Problem

_MATH_TOKENS = 32768
_TEMPLATE_TOKENS = 64  # what a chat template may add to a prompt


class LimitError(ValueError):
    """The server's context is too short; the message names the flag."""


def max_tokens(options: Options, problems: Sequence[Problem], context: int | None) -> int:
    """The run's `max_new_tokens`.

    Args:
        options: the command line.
        problems: of the whole source: a later run with another `--limit` must come to the same number.
        context: tokens that the server takes for a prompt and its generation; None if it does not say.

    Raises:
        LimitError: the longest prompt and what was asked for do not fit.
    """
    wanted = options.max_tokens
    if wanted is None and options.chains is not None:
        wanted = 8 * options.steps + 8
    if context is None:
        return wanted or _MATH_TOKENS
    longest = _longest_prompt(options, problems, exact_only=wanted is not None)
    if longest is None:
        return wanted or _MATH_TOKENS
    room = context - longest
    if room < (wanted or 1):
        flag = "--max-tokens" if options.max_tokens else "--steps/--facts" if options.chains else "--problems"
        raise LimitError(
            f"{flag}: the longest prompt has {longest} tokens and its generation may take {wanted or 1}, but the "
            f"server's context is {context}; start it with a larger --context-length, or ask for less"
        )
    return wanted or min(_MATH_TOKENS, room)


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


def _longest_prompt(options: Options, problems: Sequence[Problem], *, exact_only: bool) -> int | None:
    """Tokens of the longest prompt; if the server cannot count, bytes bound it from above, or None if `exact_only`."""
    prompts = [problem.prompt for problem in problems]
    counts = count_tokens(options.endpoint, prompts)
    if counts is None:
        if exact_only:
            return None
        counts = [len(prompt.encode()) for prompt in prompts]
    return max(counts) + (_TEMPLATE_TOKENS if options.chat else 0)
