"""The lossless mode's settings: how many tokens are drafted, and what does not go with it."""

from typing import Any

ALGORITHM = "LESSISMORE"
"""The name by which `--speculative-algorithm` turns the mode on."""
DEFAULT_STEPS = 6
"""Tokens drafted before a verification. With nine drafts in ten accepted, six gain most (`docs/lossless.md`)."""
MOST_STEPS = 15


def is_lossless(server_args: Any) -> bool:
    """Whether SGLang's server arguments ask for the lossless mode."""
    return str(getattr(server_args, "speculative_algorithm", None) or "").upper() == ALGORITHM


def steps_of(server_args: Any) -> int:
    """Tokens drafted before a verification, by whichever flag says so."""
    steps, tokens = server_args.speculative_num_steps, server_args.speculative_num_draft_tokens
    if steps is not None:
        return int(steps)
    return DEFAULT_STEPS if tokens is None else int(tokens) - 1


def steps_problems(server_args: Any) -> list[str]:
    """Reasons in SGLang's flags of speculation, as the user gave them."""
    found, steps = [], steps_of(server_args)
    tokens, width = server_args.speculative_num_draft_tokens, server_args.speculative_eagle_topk
    if not 1 <= steps <= MOST_STEPS:
        found.append(f"--speculative-num-steps must lie between 1 and {MOST_STEPS}, got {steps}; it drafts one token a step")
    if tokens is not None and int(tokens) != steps + 1:
        found.append(
            f"--speculative-num-draft-tokens {tokens}: {steps} steps draft a chain, which is verified with the token "
            f"before it, {steps + 1} in all; leave the flag out"
        )
    if width not in (None, 1):
        found.append(f"--speculative-eagle-topk {width}: drafts are one chain, not a tree; leave the flag out")
    return found
