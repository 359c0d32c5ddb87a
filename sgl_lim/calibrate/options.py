"""The command line: calibration's own flags; all others are the server's."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.programs.argument_types import integer
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES

_FACTS, _STEPS, _MAX_TOKENS = 330, 48, 256
_BUDGETS = (256, 512, 1024, 2048, 4096)
_FORBIDDEN = {
    "--lim-budget": "name the budgets with --budgets",
    "--lim-selection-layers": "they are what is looked for; leave it out",
    "--lim-preset": "it is what is written; leave it out",
    "--attention-backend": "calibration runs on lessismore; leave it out",
    "--prefill-attention-backend": "calibration runs on lessismore; leave it out",
    "--decode-attention-backend": "calibration runs on lessismore; leave it out",
    "--config": "give the server's flags on the command line",
}

_EXAMPLES = """
examples:
  %(prog)s --model-path Qwen/Qwen3-8B --prompts problems.jsonl --chat --max-tokens 4096 --output qwen3-8b.json
  %(prog)s --model-path models/chain-tracer --device cpu --chains 8 --budgets 64 128 256 --output chain-tracer.json

Flags that are not listed here go to SGLang: --tp-size, --dtype, --mem-fraction-static, --lim-aggregate, --lim-scope …
Beside FILE.json, the preset for --lim-preset, FILE.csv has the recall matrix and FILE.png its heat map.
"""


@dataclass(frozen=True)
class Options:
    """A valid command line. Either `chains` or `prompts` is set."""

    model_path: str
    chains: int | None
    facts: int
    steps: int
    seed: int
    prompts: tuple[Path, ...]
    chat: bool
    limit: int | None
    max_tokens: int
    budgets: tuple[int, ...]  # increasing
    selections: int
    max_dense: int
    concurrency: int
    output: Path
    server: tuple[str, ...]  # flags for SGLang, without the model's path

    @property
    def csv(self) -> Path:
        """Where the recall matrix goes."""
        return self.output.with_suffix(".csv")

    @property
    def heat_map(self) -> Path:
        """Where its picture goes."""
        return self.output.with_suffix(".png")


def parse(argv: list[str]) -> Options:
    """Parse and check.

    Raises:
        SystemExit: with code 2 and a message that names the flag on standard error, or 0 after `--help`.
    """
    parser = _parser()
    args, server = parser.parse_known_args(argv)
    for flag in server:
        name = flag.split("=")[0]
        if name in _FORBIDDEN:
            parser.error(f"argument {name}: {_FORBIDDEN[name]}")
    _check_sources(parser, args)
    budgets = sorted(args.budgets)
    for one, other in itertools.pairwise(budgets):
        if one == other:
            parser.error(f"argument --budgets: {one} occurs twice")
    if args.output.suffix != ".json":
        parser.error(f"argument --output: must end in .json, got {str(args.output)!r}")
    steps = args.steps or _STEPS
    return Options(
        model_path=args.model_path,
        chains=args.chains,
        facts=args.facts or _FACTS,
        steps=steps,
        seed=args.seed or 0,
        prompts=tuple(args.prompts or ()),
        chat=args.chat,
        limit=args.limit,
        # A chain's answer has eight words a step.
        max_tokens=args.max_tokens or (8 * steps + 8 if args.chains else _MAX_TOKENS),
        budgets=tuple(budgets),
        selections=args.selections,
        max_dense=args.max_dense,
        concurrency=args.concurrency,
        output=args.output,
        server=tuple(server),
    )


def _check_sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of the source that was not chosen, and sizes that no chain has."""
    foreign, source = ["limit", "chat"], "--prompts"
    if args.chains is None:
        foreign, source = ["facts", "steps", "seed"], "--chains"
    for name in foreign:
        if getattr(args, name):
            parser.error(f"argument --{name}: only with {source}")
    if args.chains is not None and (args.steps or _STEPS) > (args.facts or _FACTS):
        parser.error(f"argument --steps: must be at most --facts ({args.facts or _FACTS}), got {args.steps or _STEPS}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.calibrate",
        description="Measure which layers should select on a model and its prompts, and write a preset for the server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", required=True, metavar="MODEL", help="any model that the backend serves")
    add("--output", type=Path, required=True, metavar="FILE.json", help="preset to write")
    source = parser.add_argument_group("prompts (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSONL with 'prompt' or 'problem' in each line, or any other file: its text is one prompt",
    )
    source.add_argument("--chains", type=integer(1), metavar="N", help="N generated chains, for models/chain-tracer")
    files = parser.add_argument_group("with --prompts")
    files.add_argument("--chat", action="store_true", help="put prompts into a user turn of the model's chat template")
    files.add_argument("--limit", type=integer(1), metavar="N", help="only the first N prompts")
    chains = parser.add_argument_group("with --chains")
    chains.add_argument(
        "--facts", type=integer(2, NUM_NODES), metavar="N", help=f"facts in the context (default: {_FACTS})"
    )
    chains.add_argument("--steps", type=integer(1, MAX_STEPS), metavar="N", help=f"links to follow (default: {_STEPS})")
    chains.add_argument("--seed", type=integer(0), metavar="N", help="default: 0")

    _add_calibration(parser.add_argument_group("calibration"))
    return parser


def _add_calibration(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--max-tokens",
        type=integer(2),
        metavar="N",
        help=f"tokens to generate after each prompt, greedily (default: {_MAX_TOKENS}, or what a chain's answer takes)",
    )
    what.add_argument(
        "--budgets",
        type=integer(1),
        nargs="+",
        default=_BUDGETS,
        metavar="K",
        help=f"budgets to record (default: {' '.join(map(str, _BUDGETS))})",
    )
    what.add_argument(
        "--selections", type=integer(1), default=2, metavar="N", help="selection layers (default: %(default)s)"
    )
    what.add_argument(
        "--max-dense",
        type=integer(0),
        default=2,
        metavar="N",
        help="most dense layers before the first selection layer (default: %(default)s)",
    )
    what.add_argument(
        "--concurrency", type=integer(1), default=8, metavar="N", help="prompts in a batch (default: %(default)s)"
    )
