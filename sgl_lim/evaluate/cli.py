"""The command: check, load, decode suite by suite, write, in this order."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

from sgl_lim.evaluate import draft_report, sources
from sgl_lim.evaluate.checkpoint import Checkpoint, load, load_config
from sgl_lim.evaluate.choices import Choice, choices_of
from sgl_lim.evaluate.draft_report import draft_table, measure_drafts, ways_of
from sgl_lim.evaluate.items import KEYS, ItemError, Sizes, Suite, chain_suite, needle_suite, text_suite
from sgl_lim.evaluate.measure import Row, measure, measured
from sgl_lim.evaluate.options import Options, parse
from sgl_lim.evaluate.output import check_output
from sgl_lim.evaluate.plot import draw
from sgl_lim.evaluate.progress import Progress
from sgl_lim.evaluate.report import csv_file, csv_row, table, verdict
from sgl_lim.evaluate.step_rows import UnsupportedModel
from sgl_lim.settings.config import configure
from sgl_lim.settings.layers import layers_for


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code: 2 for what the user can change, 130 after Ctrl-C."""
    options = parse(argv)
    try:
        choices = _choices(options)
        check_output(options.output)
        texts = _texts(options)
        checkpoint = load(options.model_path, device=options.device, dtype=options.dtype)
        for choice in choices:
            checkpoint.own_pages(choice.method)
        suites = _suites(options, checkpoint, texts)
    except (UnsupportedModel, ItemError, sources.SourceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if options.measure == "drafts":
            return _measure_drafts(options, checkpoint, suites, choices)
        rows = _measure(options, checkpoint, suites, choices)
    except ItemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {options.output} has the rows that were done", file=sys.stderr)
        return 130
    print(table(rows))
    written = [options.output, *draw(rows, options.output.with_suffix(".png"), _title(options))]
    print(f"\nwrote {', '.join(map(str, written))}\n\n{verdict(rows, options.points)}")
    return 0


def _choices(options: Options) -> list[Choice]:
    text = load_config(options.model_path).get_text_config()
    depth, longest = text.num_hidden_layers, text.max_position_embeddings
    if options.context > longest:
        raise ValueError(f"--context {options.context}: the model has positions for {longest} tokens; lower it")
    if options.selections:
        return choices_of(options.methods, options.budgets, options.selections, depth)
    found: dict[str, Choice] = {}
    for budget in options.budgets:
        layers = layers_for(options.model_path, depth, configure(budget=budget))
        served = (layers.selection_layers,)
        of_budget = choices_of(options.methods, (budget,), served, depth, attends=layers.selection_attends)
        found |= {choice.name: choice for choice in of_budget}
    return list(found.values())


def _texts(options: Options) -> dict[str, list[str]]:
    if "text" not in options.tasks:
        return {}
    found = {"english": sources.english(), "python": sources.python()}
    return {**found, "own": sources.from_files(options.texts)} if options.texts else found


def _suites(options: Options, checkpoint: Checkpoint, texts: dict[str, list[str]]) -> list[Suite]:
    sizes = Sizes(
        items=options.items,
        context=options.context,
        decoded=options.decoded,
        steps=options.steps,
        facts=options.facts,
        seed=options.seed,
    )
    found = [text_suite(checkpoint, name, of_name, sizes) for name, of_name in texts.items()]
    if "needles" in options.tasks:
        found += [needle_suite(checkpoint, name, sizes) for name in KEYS]
    if "chains" in options.tasks:
        found.append(chain_suite(checkpoint, sizes))
    unknown = checkpoint.tokenizer.unk_token_id
    for suite in found:
        if unknown is not None and any(unknown in item.right for item in suite.items):
            raise ItemError(f"the tokenizer lacks words of {suite.name}; leave {suite.task} out of --tasks")
    return found


def _measure(options: Options, checkpoint: Checkpoint, suites: list[Suite], choices: list[Choice]) -> list[Row]:
    choices = measured(checkpoint, choices)
    total = len(choices) * sum(len(item.fed) for suite in suites for item in suite.items)
    file, found, progress = csv_file(options.output, _where(options, checkpoint)), [], Progress(total)
    try:
        progress.say(f"{total:,} tokens to decode: {len(choices)} choices on {', '.join(s.name for s in suites)}")
        for suite in suites:
            progress.begin(suite.name)
            rows = measure(checkpoint, suite, choices, rows=options.rows, done=progress.add)
            file.add(map(csv_row, rows))
            found += rows
    finally:
        progress.close()
    return found


def _measure_drafts(options: Options, checkpoint: Checkpoint, suites: list[Suite], choices: list[Choice]) -> int:
    count = len(ways_of(choices))
    if not count:
        print("error: --measure drafts: no method of --methods can draft; take lessismore", file=sys.stderr)
        return 2
    total = count * sum(len(item.right) for suite in suites for item in suite.items)
    file = draft_report.draft_file(options.output, options.drafts, _where(options, checkpoint))
    found, progress = [], Progress(total)
    try:
        progress.say(f"rounds of {options.drafts} drafts: {count} ways on {', '.join(s.name for s in suites)}")
        for suite in suites:
            progress.begin(suite.name)
            rows = measure_drafts(checkpoint, suite, choices, options.drafts, progress.add)
            file.add(draft_report.csv_row(row, options.drafts) for row in rows)
            found += rows
    finally:
        progress.close()
    print(f"{draft_table(found, options.drafts)}\n\nwrote {options.output}")
    return 0


def _where(options: Options, checkpoint: Checkpoint) -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if checkpoint.model.device.type == "cuda" else platform.machine()
    return {
        "model": Path(options.model_path).name,
        "context": str(options.context),
        "seed": str(options.seed),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "device": device,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _title(options: Options) -> str:
    return f"{Path(options.model_path).name}, {options.items} items of {options.context:,} tokens"
