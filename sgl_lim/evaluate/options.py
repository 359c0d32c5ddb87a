"""The command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.methods.parameters import Increasing
from sgl_lim.programs.argument_types import integer, number
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES

TASKS = ("text", "needles", "chains")
MEASURES = ("answers", "drafts")
_PAGE = 16

_EXAMPLES = """
examples:
  %(prog)s --model-path Qwen/Qwen3-8B --context 8192 --selection 2,12 --selection 2,12,20 --device cuda
  %(prog)s --model-path models/chain-tracer --tasks chains --context 2048 --budgets 64,256 --methods lessismore,window

Methods are names of --lim-method, each with parameters if need be: lessismore:aggregate=max:recency=0.5.
Full attention is always measured, first. Beside FILE.csv, FILE.png has the figures if matplotlib is there.
"""


@dataclass(frozen=True)
class Options:
    """A valid command line."""

    model_path: str
    measure: str
    drafts: int
    """Of a round, with `measure` drafts."""
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    selections: tuple[tuple[int, ...], ...]
    """Choices of selection layers; none: those that a server takes."""
    texts: tuple[Path, ...]
    context: int
    decoded: int
    items: int
    steps: int
    facts: int | None
    seed: int
    device: str
    dtype: str
    rows: int
    points: float
    output: Path


def parse(argv: list[str]) -> Options:
    """Parse and check.

    Raises:
        SystemExit: with code 2 and a message that names the flag on standard error, or 0 after `--help`.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    tasks = args.tasks or (TASKS if args.measure == "answers" else ("text",))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        parser.error(f"argument --tasks: there are {', '.join(TASKS)}, got {', '.join(unknown)}")
    if args.decoded + 1 >= args.context:
        parser.error(f"argument --decoded: must be below --context {args.context} by 2 or more, got {args.decoded}")
    if args.measure == "drafts" and "needles" in tasks:
        parser.error("argument --tasks: needles end before a round of --measure drafts does; leave them out")
    if args.text and "text" not in tasks:
        parser.error("argument --text: only with text in --tasks")
    for layers in args.selection:
        if problem := Increasing().problem(layers):
            parser.error(f"argument --selection:{problem}")
    if args.output.suffix != ".csv":
        parser.error(f"argument --output: must end in .csv, got {str(args.output)!r}")
    eighth = max(_PAGE, args.context // 8 // _PAGE * _PAGE)
    return Options(
        model_path=args.model_path,
        measure=args.measure,
        drafts=args.drafts,
        tasks=tasks,
        methods=args.methods,
        budgets=args.budgets or (eighth,),
        selections=tuple(args.selection),
        texts=tuple(args.text),
        context=args.context,
        decoded=args.decoded,
        items=args.items,
        steps=args.steps,
        facts=args.facts,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype or ("float32" if args.device == "cpu" else "auto"),
        rows=args.rows,
        points=args.points,
        output=args.output,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _budgets(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(integer(1), text.split(","))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.evaluate",
        description="Measure what sparse decode costs on a checkpoint, and say what to set.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="a Hugging Face folder, or a name on the hub")
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--measure",
        choices=MEASURES,
        default="answers",
        help="what sparse decode answers, or how many of its drafts dense decode accepts (default: %(default)s)",
    )
    what.add_argument(
        "--drafts", type=integer(1, 64), default=7, help="of a round, with --measure drafts (default: %(default)s)"
    )
    what.add_argument("--methods", type=_words, default=("lessismore", "window"), help="by commas; see below")
    what.add_argument("--budgets", type=_budgets, metavar="K,K", help="default: an eighth of --context")
    what.add_argument(
        "--selection",
        type=Increasing().parse,
        action="append",
        default=[],
        metavar="I,J",
        help="selection layers, once for each choice (default: those that a server takes)",
    )
    _add_items(parser.add_argument_group("what is decoded"))
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    how.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="default: float32 on a CPU, elsewhere auto, which is the checkpoint's own",
    )
    how.add_argument("--rows", type=integer(1), default=64, help="decode steps at once (default: %(default)s)")
    how.add_argument(
        "--points",
        type=number(0, 100),
        default=3.0,
        help="of 100 needles or chains, how many the choice that is named may lose (default: %(default)s)",
    )
    how.add_argument(
        "--output", type=Path, default=Path("evaluation.csv"), metavar="FILE.csv", help="default: %(default)s"
    )
    return parser


def _add_items(group: argparse._ArgumentGroup) -> None:
    tasks = f"by commas (default: {','.join(TASKS)}; text with --measure drafts)"
    group.add_argument("--tasks", type=_words, help=tasks)
    group.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts of your own, in UTF-8")
    group.add_argument("--context", type=integer(64), default=4096, help="tokens of an item (default: %(default)s)")
    group.add_argument("--items", type=integer(1), default=20, help="of each kind (default: %(default)s)")
    group.add_argument("--decoded", type=integer(1), default=256, help="tokens of a text that count")
    group.add_argument("--steps", type=integer(1, MAX_STEPS), default=16, help="of a chain (default: %(default)s)")
    group.add_argument("--facts", type=integer(2, NUM_NODES), help="of a chain (default: as many as --context holds)")
    group.add_argument("--seed", type=int, default=0)
