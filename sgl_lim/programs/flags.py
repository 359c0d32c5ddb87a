"""The flags of a run and the values that they take; what may go together is `options`' business."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from sgl_lim.programs.forcing import DEFAULT_END
from sgl_lim.programs.named import DATA_DIR, NAMED
from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, PLACEHOLDER
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES

SOLVE, SELF_CONSISTENCY, TREE, BUDGET_FORCING = "solve", "self-consistency", "tree", "budget-forcing"
PROGRAMS = (SOLVE, SELF_CONSISTENCY, TREE, BUDGET_FORCING)
SAMPLES, FACTS, STEPS = 8, 330, 48
SHAPE = {"branches": 8, "keep": 2, "depth": 2, "thought_tokens": 128}
WAITS, WAIT_TEXT, FINAL_TEXT = 2, "Wait", "\n\nFinal answer:"
TEMPERATURE, TOP_P = 0.6, 0.95  # of what samples, as reasoning models' cards advise; one generation alone is greedy


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Everything but where a run's server is and where its results go."""
    add = parser.add_argument
    add("--program", choices=PROGRAMS, default=SOLVE, help="default: %(default)s")
    add(
        "--samples",
        type=integer(1),
        metavar="N",
        help=f"generations a problem, in branches that share the prompt (default: {SAMPLES} for {SELF_CONSISTENCY}, "
        f"else 1; not for {TREE})",
    )
    add("--concurrency", type=integer(1), default=8, metavar="N", help="problems in flight (default: %(default)s)")
    _add_programs(parser)
    _add_problems(parser)
    _add_sampling(parser)


def _add_programs(parser: argparse.ArgumentParser) -> None:
    tree = parser.add_argument_group(f"with --program {TREE}")
    for name, low, what in (
        ("branches", 2, "thoughts of a round, a multiple of --keep"),
        ("keep", 1, "most probable paths that a round leaves"),
        ("depth", 1, "rounds before the answer"),
        ("thought-tokens", 1, "most tokens of a thought"),
    ):
        default = SHAPE[name.replace("-", "_")]
        tree.add_argument(f"--{name}", type=integer(low), metavar="N", help=f"{what} (default: {default})")

    add = parser.add_argument_group(f"with --program {BUDGET_FORCING}").add_argument
    add(
        "--min-thinking",
        type=integer(1),
        metavar="N",
        help="thinking that ends before N tokens goes on, while there are --waits (default: --max-thinking)",
    )
    add(
        "--max-thinking",
        type=integer(1),
        metavar="N",
        help="tokens after which the answer is forced (default: seven eighths of what a generation may have)",
    )
    add("--waits", type=integer(0), metavar="N", help=f"ends to drop, at most (default: {WAITS})")
    add("--wait-text", metavar="TEXT", help=f"in place of a dropped end (default: {WAIT_TEXT!r})")
    add("--final-text", metavar="TEXT", help=f"asks for the answer after a cut (default: {FINAL_TEXT!r})")
    add(
        "--thinking-end",
        metavar="TEXT",
        help=f"ends the thinking (default: {DEFAULT_END} if the server's tokenizer has that token, else the end of the "
        "generation, which '' names as well)",
    )


def _add_problems(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("problems (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--chains", type=integer(1), metavar="N", help="N generated chains, graded exactly")
    source.add_argument(
        "--problems",
        metavar="NAME|FILE",
        help=f"{', '.join(NAMED)}, or JSONL with 'problem', 'answer' and optionally 'id', graded by math-verify "
        "(sgl-lim[math])",
    )
    add = parser.add_argument_group("with --chains").add_argument
    add("--facts", type=integer(2, NUM_NODES), metavar="N", help=f"facts in the context (default: {FACTS})")
    add("--steps", type=integer(1, MAX_STEPS), metavar="N", help=f"links to follow (default: {STEPS})")
    add("--seed", type=integer(0), metavar="N", help="default: 0")
    add = parser.add_argument_group("with --problems").add_argument
    add(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help=f"holds NAME.jsonl of the sets by name (default: ${DATA_DIR}, else the Hugging Face hub)",
    )
    add("--limit", type=integer(1), metavar="N", help="only the first N problems")
    add(
        "--prompt-template",
        metavar="TEXT",
        help=f"text with {PLACEHOLDER} (default: {DEFAULT_PROMPT_TEMPLATE!r})".replace("%", "%%"),
    )
    add("--chat", action="store_true", help="put the prompt into a user turn of the chat template")
    add(
        "--chat-template",
        metavar="NAME",
        help="SGLang frontend template, such as chatml for Qwen3 (default: by the model's path); implies --chat",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-tokens",
        type=integer(1),
        metavar="N",
        help="of a generation, with the thoughts before it (default: 8 a step and 8 for chains, else 32768 or what "
        "the server's context leaves)",
    )
    add(
        "--temperature",
        type=number(0.0, 2.0),
        metavar="T",
        help=f"default: {TEMPERATURE} with several samples or branches, else 0",
    )
    add(
        "--top-p",
        type=number(0.0, 1.0, or_low=False),
        metavar="P",
        help=f"default: {TOP_P} with several samples or branches, else 1",
    )
    add("--top-k", type=top_k, default=-1, metavar="N", help="default: -1, no limit")


def url(text: str) -> str:
    """An argument's type: an endpoint, without a trailing slash."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    try:
        parts = urlsplit(text)
        known = parts.hostname and (parts.port is None or parts.port) and not any(map(str.isspace, text))
    except ValueError:  # brackets that do not match, or a port that is no port
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"must be such as http://127.0.0.1:30000, got {text!r}")
    return text.rstrip("/")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument's type: an integer in a range."""

    def convert(text: str) -> int:
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, {expected}, got {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {value}")
        return value

    return convert


def top_k(text: str) -> int:
    """An argument's type: as many tokens, or -1 for all; servers fail every request that has 0."""
    value = integer(-1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, or -1 for no limit, got 0")
    return value


def number(low: float, high: float, *, or_low: bool = True) -> Callable[[str], float]:
    """An argument's type: a number in a range, whose lower end is outside without `or_low`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (value == low and not or_low):
            expected = f"from {low:g}" if or_low else f"above {low:g}, up"
            raise argparse.ArgumentTypeError(f"must be a number {expected} to {high:g}, got {text!r}")
        return value

    return convert
