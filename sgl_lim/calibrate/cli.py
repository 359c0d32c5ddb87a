"""The command: check, record, search, write, in this order."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sgl_lim.calibrate import report
from sgl_lim.calibrate.options import Options, parse
from sgl_lim.calibrate.prompts import PromptError, chain_prompts, encode, file_prompts
from sgl_lim.calibrate.recording import Recording, RecordingError, ask_to_record, record
from sgl_lim.calibrate.search import best_layers, measure
from sgl_lim.settings import preset_file
from sgl_lim.settings.config import LimConfig, RefusedConfig


class Refused(ValueError):
    """The command line does not fit the model; the message names the flag."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code: 2 for what the user can change, 1 for what failed."""
    options = parse(argv)
    try:
        _check_output(options.output)
        texts = _texts(options)
        server_args, model, config = _prepare(options)
        prompts = _tokens(options, texts, server_args, model)
        server_args = _with_a_pool_for(prompts, options, server_args)
    except (Refused, PromptError, RefusedConfig) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = len(prompts)
    _say(f"recording {total} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    try:
        recording = record(
            server_args,
            prompts,
            budgets=options.budgets,
            max_tokens=options.max_tokens,
            concurrency=options.concurrency,
            progress=lambda done: _say(f"{done}/{total} prompts"),
        )
    except RecordingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    preset = _preset(options, config, model, recording, server_args)
    _show(options, model, recording, preset)
    try:
        _save(options, recording, preset)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_output(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--output {path}: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise Refused(f"--output {path}: cannot be written")


def _texts(options: Options) -> list[str]:
    if options.chains is None:
        return file_prompts(options.prompts)[: options.limit]
    return chain_prompts(options.chains, num_facts=options.facts, num_steps=options.steps, seed=options.seed)


def _prepare(options: Options) -> tuple[Any, Any, LimConfig]:
    """SGLang's server arguments and model config, and our configuration; refuses what the model cannot do."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils import get_device

    from sgl_lim.settings import refusals
    from sgl_lim.settings.flags import load

    try:
        server_args = _server_args(options)
        model = ModelConfig.from_server_args(server_args)
    except RefusedConfig:
        raise
    except OSError as error:
        raise Refused(f"--model-path {options.model_path}: {error}") from error
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise Refused(f"SGLang cannot run {options.model_path} with these flags: {error}") from error
    ask_to_record(options.budgets)
    config = load()
    device = server_args.device or get_device()
    refusals.check_before_weights(config, SimpleNamespace(model_config=model, server_args=server_args, device=device))
    depth = model.num_hidden_layers
    if options.selections >= depth:
        raise Refused(f"--selections {options.selections} leaves no sparse layer in a model of {depth} layers")
    return server_args, model, config


def _server_args(options: Options, *more: str) -> Any:
    """SGLang's server arguments, by its own parser; without what would compute steps that nobody records."""
    from sglang.srt.server_args import prepare_server_args

    from sgl_lim.settings.refusals import BACKEND

    flags = ["--model-path", options.model_path, "--attention-backend", BACKEND, "--log-level", "warning"]
    flags += ["--cuda-graph-backend-decode", "disabled", "--disable-overlap-schedule"]
    return prepare_server_args([*flags, *more, *options.server])


def _with_a_pool_for(prompts: Sequence[Sequence[int]], options: Options, server_args: Any) -> Any:
    """Server arguments whose KV pool holds a batch with some room, unless a flag says how large it is.

    SGLang would take what memory there is, which on a CPU costs most of a minute to clear.
    """
    if server_args.max_total_tokens is not None:
        return server_args
    tokens = min(options.concurrency, len(prompts)) * (max(map(len, prompts)) + options.max_tokens)
    return _server_args(options, "--max-total-tokens", str(-(-tokens * 5 // 4 // 1024) * 1024 + 1024))


def _tokens(options: Options, texts: Sequence[str], server_args: Any, model: Any) -> list[list[int]]:
    """Token ids of the prompts; refuses what does not fit the model's context or exceeds no budget."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    tokenizer = get_tokenizer(
        server_args.tokenizer_path or server_args.model_path, trust_remote_code=server_args.trust_remote_code
    )
    prompts = encode(texts, tokenizer, chat=options.chat)
    source = "--chains" if options.prompts == () else "--prompts"
    if not all(prompts):
        raise Refused(f"{source}: prompt {[len(p) for p in prompts].index(0) + 1} has no token")
    longest, context = max(map(len, prompts)), model.context_len
    if longest + options.max_tokens > context:
        raise Refused(
            f"--max-tokens {options.max_tokens}: the longest prompt of {source} has {longest} tokens and the model's "
            f"context is {context}; lower it or take shorter prompts"
        )
    reached = longest + options.max_tokens - 1
    if reached <= options.budgets[0]:
        raise Refused(
            f"--budgets: no context gets longer than {options.budgets[0]}, the smallest: the longest has {reached} "
            f"tokens; name a smaller budget, give longer prompts or raise --max-tokens"
        )
    return prompts


def _preset(
    options: Options, config: LimConfig, model: Any, recording: Recording, server_args: Any
) -> preset_file.PresetFile:
    """The best layers for each budget, with what they were found by."""
    entries = []
    for budget, recall in recording.recall.items():
        best = best_layers(recall, selections=options.selections, max_dense=options.max_dense)
        measured = {**vars(best), "rows": recording.rows[budget]}
        entries.append(preset_file.Entry(budget, measured.pop("selection_layers"), measured=measured))
    prompts: dict[str, Any] = {"files": [path.name for path in options.prompts], "chat": options.chat}
    if options.chains is not None:
        prompts = {"chains": options.chains, "facts": options.facts, "steps": options.steps, "seed": options.seed}
    return preset_file.PresetFile(
        architecture=(model.hf_config.architectures or [""])[0],
        num_layers=model.num_hidden_layers,
        entries=tuple(entries),
        rule=preset_file.rule_of(config.build()),
        calibration={
            "model": Path(options.model_path).name,
            "selections": options.selections,
            "max_dense": options.max_dense,
            "prompts": {**prompts, "max_tokens": options.max_tokens, "concurrency": options.concurrency},
            "generated_tokens": recording.generated,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sglang": version("sglang"),
            "sgl_lim": version("sgl-lim"),
            "machine": _machine(),
        },
    )


def _show(options: Options, model: Any, recording: Recording, preset: preset_file.PresetFile) -> None:
    from sgl_lim.settings.presets import find_preset

    known = find_preset(model.model_path, model.num_hidden_layers)
    for entry in preset.entries:
        recall = recording.recall[entry.budget]
        print(f"\nbudget {entry.budget}: share of attention (%) covered, {recording.rows[entry.budget]} decoded tokens")
        print(report.matrix_text(recall))
        best = measure(recall, entry.selection_layers)
        print(report.choice_text(best, preset.num_layers))
        if known is not None and known.selection_layers != best.selection_layers:
            others = report.choice_text(measure(recall, known.selection_layers), preset.num_layers)
            print(f"built-in preset {known.name}: {others}")
    without = [budget for budget in options.budgets if budget not in recording.recall]
    if without:
        print(f"\nno data for budget {', '.join(map(str, without))}: no context got longer; give longer prompts")


def _save(options: Options, recording: Recording, preset: preset_file.PresetFile) -> None:
    preset.write(options.output)
    report.write_csv(options.csv, recording)
    written = [options.output, options.csv]
    try:
        title = f"{preset.calibration['model']}: attention that a set chosen at one layer covers at later ones"
        report.draw_heat_map(options.heat_map, recording.recall, preset, title)
        written.append(options.heat_map)
    except ImportError:
        print("\nno heat map: matplotlib is not installed; pip install 'matplotlib>=3.8,<4'", file=sys.stderr)
    print(f"\nwrote {', '.join(map(str, written))}; serve with --lim-preset {options.output}")


def _machine() -> str:
    """Device and versions, as results elsewhere carry them."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}; Python {platform.python_version()}; torch {torch.__version__}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
