"""The options of a run as the command line gives them: defaults, and which may go together."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_lim.programs import api_key, run_flags
from sgl_lim.programs.argument_types import url
from sgl_lim.programs.builtin_problems import BUILTIN
from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, PLACEHOLDER
from sgl_lim.programs.run_flags import BUDGET_FORCING, SELF_CONSISTENCY, SHAPE, TREE
from sgl_lim.programs.tree_shape import TreeShape

_FORCING = {
    "min_thinking": None,
    "max_thinking": None,
    "waits": run_flags.WAITS,
    "wait_text": run_flags.WAIT_TEXT,
    "final_text": run_flags.FINAL_TEXT,
    "thinking_end": None,
}

_FLAGS_OF = {
    "chains": ("facts", "steps", "seed"),
    "needles": ("sentences", "keys", "seed"),
    "problems": ("limit", "prompt_template", "data_dir"),
}
"""By source of problems, the flags that are for it alone."""

_EXAMPLES = """
examples:
  %(prog)s --chains 32 --output out/chains.jsonl
  %(prog)s --needles 64 --sentences 600 --chat-template chatml --output out/needles.jsonl
  %(prog)s --problems aime2024 --samples 32 --chat-template chatml --output out/aime.jsonl --summary out/aime.json
  %(prog)s --program self-consistency --samples 8 --problems mine.jsonl --chat-template chatml --output out/mine.jsonl
  %(prog)s --program tree --branches 8 --keep 2 --depth 2 --thought-tokens 1024 --problems aime2024 \\
      --chat-template chatml --output out/tree.jsonl
  %(prog)s --program budget-forcing --min-thinking 4096 --max-thinking 16384 --problems math500 \\
      --chat-template chatml --output out/budget.jsonl

The output has one line a problem. Run the same command again to resume: answered problems are skipped, failed
ones are asked again, and a file with results of other settings is refused.
"""


@dataclass(frozen=True)
class ForcingOptions:
    """Budget forcing as the command line has it; None where the server or other flags decide."""

    min_thinking: int | None
    max_thinking: int | None
    waits: int
    wait_text: str
    final_text: str
    thinking_end: str | None


@dataclass(frozen=True)
class Options:
    """A valid command line. One of `chains`, `needles` and `problems` is set."""

    endpoint: str  # without a trailing slash
    program: str
    samples: int | None  # None for one
    tree: TreeShape | None  # of tree
    forcing: ForcingOptions | None  # of budget-forcing
    chains: int | None
    facts: int
    steps: int
    needles: int | None
    sentences: int
    keys: int
    seed: int
    problems: str | None  # a name of `BUILTIN`, or a path
    data_dir: Path | None
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
    api_key: str | None = field(default=None, repr=False)  # None: the environment's


def parse(argv: list[str]) -> Options:
    """Parse and check.

    Raises:
        SystemExit: with code 2 and a message that names the flag on standard error, or 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sgl_lim.programs",
        description="Run a reasoning program against a SGLang endpoint, grade its answers and sum them up.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--endpoint", type=url, default="http://127.0.0.1:30000", metavar="URL", help="default: %(default)s")
    api_key.add_flag(parser)
    run_flags.add_run_flags(parser)
    add("--output", type=Path, required=True, metavar="FILE", help="JSONL to write, or to resume")
    add("--summary", type=Path, metavar="FILE", help="write the summary as JSON too")
    args = parser.parse_args(argv)
    if args.summary is not None and args.summary.resolve() == args.output.resolve():
        parser.error("argument --summary: is the file of --output; name another")
    return checked(parser, args, args.endpoint, args.output, args.summary)


def checked(
    parser: argparse.ArgumentParser, args: argparse.Namespace, endpoint: str, output: Path, summary: Path | None
) -> Options:
    """The options in the values of `run_flags.add_run_flags`; exits as `parse` does."""
    _check_sources(parser, args)
    chat = args.chat or args.chat_template is not None
    samples = _samples(parser, args)
    shape = _of_program(parser, args, TREE, SHAPE)
    if shape and shape["branches"] % shape["keep"]:
        parser.error(f"argument --branches: must be a multiple of --keep ({shape['keep']}), got {shape['branches']}")
    forcing = _of_program(parser, args, BUDGET_FORCING, _FORCING)
    if forcing:
        _check_forcing(parser, forcing)
    branching = args.program == TREE or samples is not None
    if branching and args.temperature == 0:
        flag = f"--program {TREE}" if samples is None else f"{samples} samples"
        parser.error(f"argument --temperature: must be above 0 with {flag} (equal branches else)")
    return Options(
        endpoint=endpoint,
        program=args.program,
        samples=samples,
        tree=TreeShape(**shape) if shape else None,
        forcing=ForcingOptions(**forcing) if forcing else None,
        chains=args.chains,
        facts=args.facts or run_flags.FACTS,
        steps=args.steps or run_flags.STEPS,
        needles=args.needles,
        sentences=args.sentences or run_flags.SENTENCES,
        keys=args.keys or run_flags.KEYS,
        seed=args.seed or 0,
        problems=args.problems,
        data_dir=args.data_dir,
        limit=args.limit,
        prompt_template=args.prompt_template or DEFAULT_PROMPT_TEMPLATE + ("" if chat else "\n"),
        chat=chat,
        chat_template=args.chat_template,
        max_tokens=args.max_tokens,
        temperature=(run_flags.TEMPERATURE if branching else 0.0) if args.temperature is None else args.temperature,
        top_p=(run_flags.TOP_P if branching else 1.0) if args.top_p is None else args.top_p,
        top_k=args.top_k,
        concurrency=args.concurrency,
        output=output,
        summary=summary,
        api_key=args.api_key,
    )


def _samples(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int | None:
    """How many generations a problem has; None for one."""
    if args.program == TREE and args.samples is not None:
        parser.error(f"argument --samples: not with --program {TREE}, which comes to one answer by its --branches")
    if args.program != SELF_CONSISTENCY:
        return None if args.samples == 1 else args.samples
    if args.samples == 1:
        parser.error(f"argument --samples: must be at least 2 with --program {SELF_CONSISTENCY}, got 1")
    return args.samples or run_flags.SAMPLES


def _check_forcing(parser: argparse.ArgumentParser, forcing: dict[str, Any]) -> None:
    least, most = forcing["min_thinking"], forcing["max_thinking"]
    if least is not None and most is not None and least > most:
        parser.error(f"argument --min-thinking: must be at most --max-thinking ({most}), got {least}")
    for name in ("wait_text", "final_text"):
        if not forcing[name]:
            parser.error(f"argument --{name.replace('_', '-')}: must not be empty")


def _of_program(
    parser: argparse.ArgumentParser, args: argparse.Namespace, program: str, defaults: dict[str, Any]
) -> dict[str, Any]:
    """Values of the flags that only `program` has; none for another program, which must not be given them."""
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    if args.program == program:
        return {**defaults, **given}
    for name in given:
        parser.error(f"argument --{name.replace('_', '-')}: only with --program {program}")
    return {}


def _check_sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of the source that was not chosen, and sizes that no chain has."""
    chosen = next(source for source in _FLAGS_OF if getattr(args, source) is not None)
    for name in {name: None for names in _FLAGS_OF.values() for name in names if name not in _FLAGS_OF[chosen]}:
        if getattr(args, name) is not None:
            sources = [f"--{source}" for source, names in _FLAGS_OF.items() if name in names]
            parser.error(f"argument --{name.replace('_', '-')}: only with {' or '.join(sources)}")
    if args.prompt_template is not None and PLACEHOLDER not in args.prompt_template:
        parser.error(f"argument --prompt-template: must contain {PLACEHOLDER}, got {args.prompt_template!r}")
    if args.data_dir is not None and args.problems not in BUILTIN:
        parser.error(f"argument --data-dir: only with --problems {' or '.join(BUILTIN)}")
    if args.chains is not None:
        facts, steps = args.facts or run_flags.FACTS, args.steps or run_flags.STEPS
        if steps > facts:
            parser.error(f"argument --steps: must be at most --facts ({facts}), got {steps}")
        if args.chat or args.chat_template is not None:
            parser.error("argument --chat: not with --chains, which are plain text")
