"""The flags of a run and their defaults; `run_options` says which may go together."""

import argparse
from pathlib import Path

from sgl_lim import command
from sgl_lim.programs.argument_types import integer, number, top_k
from sgl_lim.programs.builtin_problems import BUILTIN, DATA_DIR
from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, PLACEHOLDER
from sgl_lim.programs.thinking_budget import DEFAULT_END
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES
from sgl_lim.tasks.needles import MAX_KEYS, SHORTEST

SOLVE, SELF_CONSISTENCY, TREE, BUDGET_FORCING = "solve", "self-consistency", "tree", "budget-forcing"
PROGRAMS = (SOLVE, SELF_CONSISTENCY, TREE, BUDGET_FORCING)
SAMPLES, FACTS, STEPS, SENTENCES, KEYS = 8, 330, 48, 130, 1
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
        help="thinking is cut after N tokens and the answer asked for (default: seven eighths of what a generation may "
        "have)",
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
    source.add_argument("--needles", type=integer(1), metavar="N", help="N codes hidden in prose, graded exactly")
    source.add_argument(
        "--problems",
        metavar="NAME|FILE",
        help=f"{', '.join(BUILTIN)}, or JSONL with 'problem', 'answer' and optionally 'id', graded by math-verify "
        f"({command.REQUIREMENTS['math_verify']})",
    )
    add = parser.add_argument_group("with --chains").add_argument
    add("--facts", type=integer(2, NUM_NODES), metavar="N", help=f"facts in the context (default: {FACTS})")
    add("--steps", type=integer(1, MAX_STEPS), metavar="N", help=f"links to follow (default: {STEPS})")
    add = parser.add_argument_group("with --needles").add_argument
    add(
        "--sentences",
        type=integer(SHORTEST),
        metavar="N",
        help=f"of prose, some 14 tokens each (default: {SENTENCES})",
    )
    add(
        "--keys",
        type=integer(1, MAX_KEYS),
        metavar="N",
        help=f"hidden codes, one of which is asked for (default: {KEYS})",
    )
    add = parser.add_argument_group("with --chains and --needles").add_argument
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
        help="of a generation, with the thoughts before it (default: 8 a step and 8 for chains, 64 for needles, else "
        "32768 or what the server's context leaves)",
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
