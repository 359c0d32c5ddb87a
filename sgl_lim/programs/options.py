"""The command line: flags, their defaults and what may go together."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, PLACEHOLDER
from sgl_lim.programs.tree import TreeShape
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES

_SOLVE, _SELF_CONSISTENCY, _TREE = "solve", "self-consistency", "tree"
_SAMPLES, _FACTS, _STEPS = 8, 330, 48
_SHAPE = {"branches": 8, "keep": 2, "depth": 2, "thought_tokens": 128}
_TEMPERATURE, _TOP_P = 0.6, 0.95  # of what branches, as reasoning models' cards advise; solve is greedy

_EXAMPLES = """
examples:
  %(prog)s --chains 32 --output out/chains.jsonl
  %(prog)s --program self-consistency --samples 8 --problems aime2024.jsonl --chat-template chatml \\
      --output out/aime.jsonl --summary out/aime.json
  %(prog)s --program tree --branches 8 --keep 2 --depth 2 --thought-tokens 1024 --problems aime2024.jsonl \\
      --chat-template chatml --output out/tree.jsonl

The output has one line a problem. Run the same command again to resume: answered problems are skipped, failed
ones are asked again, and a file with results of other settings is refused.
"""


@dataclass(frozen=True)
class Options:
    """A valid command line. Either `chains` or `problems` is set."""

    endpoint: str  # without a trailing slash
    program: str
    samples: int | None  # of self-consistency
    tree: TreeShape | None  # of tree
    chains: int | None
    facts: int
    steps: int
    seed: int
    problems: Path | None
    limit: int | None
    prompt_template: str
    chat: bool
    chat_template: str | None
    max_tokens: int | None  # None: by the problems and the server's context
    temperature: float
    top_p: float
    top_k: int
    concurrency: int
    output: Path
    summary: Path | None


def parse(argv: list[str]) -> Options:
    """Parse and check.

    Raises:
        SystemExit: with code 2 and a message that names the flag on standard error, or 0 after `--help`.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check_sources(parser, args)
    chat = args.chat or args.chat_template is not None
    branching = args.program != _SOLVE
    samples = _of_program(parser, args, _SELF_CONSISTENCY, {"samples": _SAMPLES})
    shape = _of_program(parser, args, _TREE, _SHAPE)
    if shape and shape["branches"] % shape["keep"]:
        parser.error(f"argument --branches: must be a multiple of --keep ({shape['keep']}), got {shape['branches']}")
    if branching and args.temperature == 0:
        parser.error(f"argument --temperature: must be above 0 with --program {args.program} (equal branches else)")
    if args.summary is not None and args.summary.resolve() == args.output.resolve():
        parser.error("argument --summary: is the file of --output; name another")
    return Options(
        endpoint=args.endpoint,
        program=args.program,
        samples=samples.get("samples"),
        tree=TreeShape(**shape) if shape else None,
        chains=args.chains,
        facts=args.facts or _FACTS,
        steps=args.steps or _STEPS,
        seed=args.seed or 0,
        problems=args.problems,
        limit=args.limit,
        prompt_template=args.prompt_template or DEFAULT_PROMPT_TEMPLATE + ("" if chat else "\n"),
        chat=chat,
        chat_template=args.chat_template,
        max_tokens=args.max_tokens,
        temperature=(_TEMPERATURE if branching else 0.0) if args.temperature is None else args.temperature,
        top_p=(_TOP_P if branching else 1.0) if args.top_p is None else args.top_p,
        top_k=args.top_k,
        concurrency=args.concurrency,
        output=args.output,
        summary=args.summary,
    )


def _of_program(
    parser: argparse.ArgumentParser, args: argparse.Namespace, program: str, defaults: dict[str, int]
) -> dict[str, int]:
    """Values of the flags that only `program` has; none for another program, which must not be given them."""
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    if args.program == program:
        return {**defaults, **given}
    for name in given:
        parser.error(f"argument --{name.replace('_', '-')}: only with --program {program}")
    return {}


def _check_sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of the source that was not chosen, and sizes that no chain has."""
    foreign = ("facts", "steps", "seed") if args.chains is None else ("limit", "prompt_template")
    source = "--chains" if args.chains is None else "--problems"
    for name in foreign:
        if getattr(args, name) is not None:
            parser.error(f"argument --{name.replace('_', '-')}: only with {source}")
    if args.prompt_template is not None and PLACEHOLDER not in args.prompt_template:
        parser.error(f"argument --prompt-template: must contain {PLACEHOLDER}, got {args.prompt_template!r}")
    if args.chains is not None:
        facts, steps = args.facts or _FACTS, args.steps or _STEPS
        if steps > facts:
            parser.error(f"argument --steps: must be at most --facts ({facts}), got {steps}")
        if args.chat or args.chat_template is not None:
            parser.error("argument --chat: only with --problems (chains are plain text)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.programs",
        description="Run a reasoning program against a SGLang endpoint, grade its answers and sum them up.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--endpoint", type=_url, default="http://127.0.0.1:30000", metavar="URL", help="default: %(default)s")
    add("--program", choices=(_SOLVE, _SELF_CONSISTENCY, _TREE), default=_SOLVE, help="default: %(default)s")
    add("--samples", type=_integer(2), metavar="N", help=f"branches of {_SELF_CONSISTENCY} (default: {_SAMPLES})")
    tree = parser.add_argument_group("with --program tree")
    for name, low, what in (
        ("branches", 2, "thoughts of a round, a multiple of --keep"),
        ("keep", 1, "most probable paths that a round leaves"),
        ("depth", 1, "rounds before the answer"),
        ("thought-tokens", 1, "most tokens of a thought"),
    ):
        default = _SHAPE[name.replace("-", "_")]
        tree.add_argument(f"--{name}", type=_integer(low), metavar="N", help=f"{what} (default: {default})")

    source = parser.add_argument_group("problems (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--chains", type=_integer(1), metavar="N", help="N generated chains, graded exactly")
    source.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="JSONL with 'problem', 'answer' and optionally 'id', graded by math-verify (sgl-lim[math])",
    )
    chains = parser.add_argument_group("with --chains")
    chains.add_argument(
        "--facts", type=_integer(2, NUM_NODES), metavar="N", help=f"facts in the context (default: {_FACTS})"
    )
    chains.add_argument(
        "--steps", type=_integer(1, MAX_STEPS), metavar="N", help=f"links to follow (default: {_STEPS})"
    )
    chains.add_argument("--seed", type=_integer(0), metavar="N", help="default: 0")
    files = parser.add_argument_group("with --problems")
    files.add_argument("--limit", type=_integer(1), metavar="N", help="only the first N problems")
    files.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help=f"text with {PLACEHOLDER} (default: {DEFAULT_PROMPT_TEMPLATE!r})".replace("%", "%%"),
    )
    files.add_argument("--chat", action="store_true", help="put the prompt into a user turn of the chat template")
    files.add_argument(
        "--chat-template",
        metavar="NAME",
        help="SGLang frontend template, such as chatml for Qwen3 (default: by the model's path); implies --chat",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-tokens",
        type=_integer(1),
        metavar="N",
        help="of a generation, with the thoughts before it (default: 8 a step and 8 for chains, else 32768 or what "
        "the server's context leaves)",
    )
    sampling.add_argument(
        "--temperature",
        type=_number(0.0, 2.0),
        metavar="T",
        help=f"default: 0 for solve, {_TEMPERATURE} for what branches",
    )
    sampling.add_argument(
        "--top-p", type=_number(0.0, 1.0), metavar="P", help=f"default: 1 for solve, {_TOP_P} for what branches"
    )
    sampling.add_argument("--top-k", type=_integer(-1), default=-1, metavar="N", help="default: -1, no limit")

    add("--concurrency", type=_integer(1), default=8, metavar="N", help="problems in flight (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="FILE", help="JSONL to write, or to resume")
    add("--summary", type=Path, metavar="FILE", help="write the summary as JSON too")
    return parser


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    return text.rstrip("/")


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
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


def _number(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return convert
