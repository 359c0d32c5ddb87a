"""The command: check, load, search, measure what was chosen, write, in this order."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sgl_lim.calibrate.files import preset_of, save
from sgl_lim.calibrate.job import Job, Result, calibrate, prepare
from sgl_lim.calibrate.options import Options, parse
from sgl_lim.calibrate.prompts import PromptError, encode, file_prompts
from sgl_lim.calibrate.report import conclusion, table
from sgl_lim.evaluate.checkpoint import Checkpoint, load, load_config
from sgl_lim.evaluate.items import ItemError
from sgl_lim.evaluate.output import check_output
from sgl_lim.evaluate.sources import SourceError
from sgl_lim.evaluate.step_rows import UnsupportedModel
from sgl_lim.settings import kept_calibration
from sgl_lim.settings.config import RefusedConfig


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code: 2 for what the user can change, 130 after Ctrl-C."""
    options = parse(argv)
    try:
        if options.output is not None:
            check_output(options.output)
        texts = file_prompts(options.prompts)[: options.limit]
        job = prepare(options, load_config(options.model_path))
        print(f"loading {options.model_path}", file=sys.stderr, flush=True)
        checkpoint = load(options.model_path, device=options.device, dtype=options.dtype)
        results = calibrate(job, checkpoint, _tokens(options, job, checkpoint, texts))
        preset = preset_of(options, job, checkpoint, results)
        written = save(options, job, results, preset)
        kept = kept_calibration.keep(preset, options.model_path) if options.keep else None
    except (UnsupportedModel, ItemError, SourceError, PromptError, RefusedConfig, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: --device {options.device} has too little memory for --context {job.sizes.context}; lower it, or "
            f"calibrate with --device cpu ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"error: the result cannot be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written and nothing is kept", file=sys.stderr)
        return 130
    _show(options, job, results, written, kept)
    return 0


def _tokens(options: Options, job: Job, checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the user's prompts; refuses what does not fit the model or exceeds no budget."""
    if not texts:
        return []
    prompts = encode(texts, checkpoint.tokenizer, chat=options.chat)
    if not all(prompts):
        raise ValueError(f"--prompts: prompt {[len(p) for p in prompts].index(0) + 1} has no token")
    longest = max(map(len, prompts))
    if longest + options.max_tokens > checkpoint.longest:
        raise ValueError(
            f"--max-tokens {options.max_tokens}: the longest prompt of --prompts has {longest} tokens and the model "
            f"has positions for {checkpoint.longest}; lower it or take shorter prompts"
        )
    if longest + options.max_tokens - 1 <= job.budgets[0]:
        raise ValueError(
            f"--budgets: no context of --prompts gets longer than {job.budgets[0]}, the smallest: the longest has "
            f"{longest + options.max_tokens - 1} tokens; name a smaller budget, give longer prompts or raise "
            "--max-tokens"
        )
    return prompts


def _show(options: Options, job: Job, results: Sequence[Result], written: Sequence[Path], kept: Path | None) -> None:
    for result in results:
        print(table(result, job), end="\n\n")
    if written:
        print(f"wrote {', '.join(map(str, written))}; serve with --lim-preset {written[0]}")
    if kept is not None:
        print(f"kept in {kept}: the next server on this checkpoint uses it")
    print()
    for result in results:
        print(conclusion(result, job))
