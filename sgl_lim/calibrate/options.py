"""The command line: calibration's own flags, and those of the rule that is calibrated."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_lim.methods import METHODS
from sgl_lim.methods.parameters import flag
from sgl_lim.methods.ranked import Ranked
from sgl_lim.programs.argument_types import integer, number
from sgl_lim.settings.config import LimConfig, RefusedConfig, configure
from sgl_lim.settings.flags import add_flags, read_environment

MAX_TOKENS = 256
ATTENDS = ("set", "context")
_RULE = ("method", "aggregate", "scope", "sinks", "recency")
_ELSEWHERE = {
    "budget": "name the budgets with --budgets",
    "selection_layers": "they are what is looked for; leave it out",
    "selection_attends": "it is looked for too; fix it with --attends",
    "preset": "it is what is written; leave it out",
    "dense_backend": "no SGLang runs here; give it to the server",
    "prefix_groups": "it changes no set; give it to the server",
    "prefix_selection": "each request is measured by itself; give it to the server",
    "selection_interval": "every step selects while layers are measured; give it to the server",
    "early_sets": "every step selects while layers are measured; give it to the server",
    "top_p": "layers are measured with whole budgets; give it to the server",
    "top_p_floor": "layers are measured with whole budgets; give it to the server",
}
_EXAMPLES = """
examples:
  %(prog)s --model-path Qwen/Qwen3-8B
  %(prog)s --model-path Qwen/Qwen3-8B --prompts problems.jsonl --chat --max-tokens 1024 --output qwen3-8b.json
  %(prog)s --model-path models/chain-tracer --device cpu --budgets 64 128

The rule: of the candidates that read at most --reads layers whole, the one whose next tokens differ least from those of
full attention (KL divergence), among those that lose at most 2 of 100 needles and chains, or one, and little of their
probability. It is chosen on one part of the items and reported on another.

The result is kept for this checkpoint in your cache, and the next server on it uses it. With --output, FILE.json is the
same as a preset for --lim-preset, FILE.csv has every candidate, and FILE.png the frontier.
"""


@dataclass(frozen=True)
class Options:
    """A valid command line; None where the device or the model decides."""

    model_path: str
    prompts: tuple[Path, ...]
    chat: bool
    limit: int | None
    max_tokens: int
    context: int | None
    budgets: tuple[int, ...]  # increasing; none: an eighth of the context
    reads: float | None
    max_dense: int | None
    attends: tuple[str, ...]
    seed: int
    device: str
    dtype: str
    output: Path | None
    keep: bool
    rule: LimConfig

    @property
    def csv(self) -> Path | None:
        """Where all candidates go."""
        return self.output and self.output.with_suffix(".csv")

    @property
    def picture(self) -> Path | None:
        """Where the frontier goes."""
        return self.output and self.output.with_suffix(".png")


def parse(argv: list[str]) -> Options:
    """Parse and check.

    Raises:
        SystemExit: with code 2 and a message that names the flag on standard error, or 0 after `--help`.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unknown arguments {' '.join(unknown)}: calibration loads the model by transformers and starts no SGLang; "
            "leave out what is SGLang's"
        )
    for name in ("chat", "limit"):
        if getattr(args, name) and not args.prompts:
            parser.error(f"argument --{name}: only with --prompts")
    budgets = sorted(args.budgets)
    for one, other in itertools.pairwise(budgets):
        if one == other:
            parser.error(f"argument --budgets: {one} occurs twice")
    if args.output is not None and args.output.suffix != ".json":
        parser.error(f"argument --output: must end in .json, got {str(args.output)!r}")
    if args.no_keep and args.output is None:
        parser.error("argument --no-keep: nothing would be written; name a file with --output")
    device = args.device or _device()
    return Options(
        model_path=args.model_path,
        prompts=tuple(args.prompts or ()),
        chat=args.chat,
        limit=args.limit,
        max_tokens=args.max_tokens,
        context=args.context,
        budgets=tuple(budgets),
        reads=args.reads,
        max_dense=args.max_dense,
        attends=ATTENDS if args.attends is None else (args.attends,),
        seed=args.seed,
        device=device,
        dtype=args.dtype or ("float32" if device == "cpu" else "auto"),
        output=args.output,
        keep=not args.no_keep,
        rule=_rule(parser, args),
    )


def _rule(parser: argparse.ArgumentParser, args: argparse.Namespace) -> LimConfig:
    """The configuration that is calibrated: flags, over the environment variable as for a server."""
    given = {name.removeprefix("lim_"): value for name, value in vars(args).items() if name.startswith("lim_")}
    for name in given:
        if name not in _RULE:
            parser.error(f"argument {flag(name)}: {_ELSEWHERE.get(name, 'is no part of what is calibrated')}")
    try:
        values: dict[str, Any] = {**read_environment(), **given}
        config = configure(**{name: value for name, value in values.items() if name in _RULE})
        # Budgets come later; the values themselves can be told now.
        problems = config.problems()
    except RefusedConfig as error:
        parser.error(str(error))
    kind = METHODS.get(config.method)
    if not problems and (kind is None or not issubclass(kind, Ranked)):
        problems = [f"{flag('method')} {config.method}: it has no selection layers; there is nothing to calibrate"]
    if not problems and config.given.get("recency") == "auto":
        problems = [f"{flag('recency')} auto: layers are measured with a window of one length; name a share"]
    if problems:
        parser.error("; ".join(problems))
    return config


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.calibrate",
        description="Find the layers that should select on a checkpoint, and keep them for its next server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="a Hugging Face folder, or a name on the hub")
    what = parser.add_argument_group("what is looked for")
    what.add_argument(
        "--budgets", type=integer(1), nargs="+", default=[], metavar="K", help="default: an eighth of --context"
    )
    what.add_argument(
        "--reads",
        type=number(0.5, 1000),
        metavar="N",
        help="layers read whole in a step, at most: a dense one counts 1, a selection layer 1, or a half if it attends "
        "to its set (default: what spaced layers read, which a server takes that knows nothing of the checkpoint)",
    )
    what.add_argument(
        "--max-dense", type=integer(0), metavar="N", help="most dense layers at the beginning (default: a third)"
    )
    what.add_argument("--attends", choices=ATTENDS, help="what selection layers attend to (default: both are tried)")
    _add_items(parser.add_argument_group("what is decoded"))
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="as torch names it (default: cuda if there is one, else cpu)")
    how.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="default: float32 on a CPU, elsewhere auto, which is the checkpoint's own",
    )
    how.add_argument("--output", type=Path, metavar="FILE.json", help="write the result to files too")
    how.add_argument("--no-keep", action="store_true", help="do not keep the result for the checkpoint's next server")
    add_flags(parser)
    return parser


def _add_items(items: argparse._ArgumentGroup) -> None:
    items.add_argument(
        "--context", type=integer(256), metavar="N", help="tokens of an item (default: 4096, on a CPU 1536)"
    )
    items.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="prompts of your own beside the built-in items: each line of FILE.jsonl has a prompt or a problem, any "
        "other file is one prompt. They are continued greedily",
    )
    items.add_argument("--chat", action="store_true", help="each prompt is a user turn of the model's chat template")
    items.add_argument("--limit", type=integer(1), metavar="N", help="the first N prompts")
    items.add_argument(
        "--max-tokens", type=integer(2), default=MAX_TOKENS, metavar="N", help="behind a prompt (default: %(default)s)"
    )
    items.add_argument("--seed", type=int, default=0)
