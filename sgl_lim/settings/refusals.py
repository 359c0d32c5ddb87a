"""What sparse decode cannot serve, told before weights load where possible. Every reason names a flag and a way out."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from sgl_lim.methods import Method
from sgl_lim.methods.parameters import Increasing, flag, parameters_of
from sgl_lim.settings import drafts, preset_file
from sgl_lim.settings.architectures import architecture_problems
from sgl_lim.settings.config import LimConfig, RefusedConfig
from sgl_lim.settings.draft_methods import draft_problems
from sgl_lim.settings.gate_problems import gate_problems
from sgl_lim.settings.layers import resolve_layers

logger = logging.getLogger(__name__)

BACKEND = "lessismore"
DENSE_BACKENDS = ("fa3", "flashinfer", "triton", "torch_native")


def decodes_sparsely(server_args: Any) -> bool:
    """Whether the server's decode backend is ours, in either form of the flag."""
    decode = server_args.decode_attention_backend or server_args.attention_backend
    return decode == BACKEND


def names_us(server_args: Any) -> bool:
    """Whether any attention backend flag names ours."""
    names = (server_args.attention_backend, server_args.prefill_attention_backend, server_args.decode_attention_backend)
    return BACKEND in names


def default_dense_backend(device: str) -> str:
    """Dense backend where `--lim-dense-backend` names none: fa3 on sm_90, flashinfer on other CUDA, else torch."""
    if device != "cuda":
        return "torch_native"
    if torch.version.hip is not None:
        return "triton"
    return "fa3" if torch.cuda.get_device_capability()[0] == 9 else "flashinfer"


def check_before_weights(config: LimConfig, model_runner: Any) -> None:
    """Refuse what configuration, server arguments and the model's config already tell.

    Args:
        config: the plugin's configuration.
        model_runner: SGLang's model runner, before `load_model`.

    Raises:
        RefusedConfig: with all reasons at once.
    """
    model, server_args, device = model_runner.model_config, model_runner.server_args, model_runner.device
    # Where the runner has it, it is resolved; a server argument may be as the user left it.
    page_size = getattr(model_runner, "page_size", None) or getattr(server_args, "page_size", None) or 1
    reasons = config.problems() + model_problems(config, model, server_args.load_format)
    reasons += server_problems(server_args, device) + head_problems(model, attention_ranks(server_args), device)
    reasons += speculation_problems(server_args, device)
    reasons += device_problems(config.dense_backend, server_args, device)
    method = config.sound_method()
    if method is not None:
        reasons += method.device_problems(device) + unseen_writes_problems(method, server_args)
        reasons += page_problems(method, server_args, page_size)
        reasons += gate_problems(method, model, attention_ranks(server_args))
        if drafts.is_lossless(server_args):
            reasons += drafts.model_problems(model) + draft_problems(method, guided=config.drafts == "guided")
    if reasons:
        raise RefusedConfig(reasons)


def model_problems(config: LimConfig, model: Any, load_format: str = "auto") -> list[str]:
    """Reasons in the model's architecture, and in its selection layers; arguments as `resolve_layers`."""
    found = architecture_problems(model)
    layers, depth = config.selection_layers, model.num_hidden_layers
    form = Increasing()
    if layers is not None and form.problem(layers) is None and layers[-1] >= depth:
        found.append(
            f"{flag('selection_layers')} {form.show(layers)} goes beyond the model's {depth} layers; "
            f"choose among 0 to {depth - 1}"
        )
    return found + resolved_problems(config, model, load_format)


def resolved_problems(config: LimConfig, model: Any, load_format: str) -> list[str]:
    """Reasons in the layers that no flag names, and in the file of `--lim-preset`, read whoever wins over it."""
    if isinstance(config.preset, str):
        try:
            preset_file.load_for(config.preset, model)
        except preset_file.PresetError as error:
            return [f"--lim-preset {error}"]
    if isinstance(config.selection_layers, tuple) or config.problems():
        return []
    # What the method says of selection layers that a flag names, it says of these.
    layers = resolve_layers(config, model, load_format)
    return [
        f"{reason} (the layers are those of {layers.source})"
        for reason in config.build(**layers.parameters).conflicts()
    ]


def attention_groups(server_args: Any) -> int:
    """Groups of DP attention, each with requests of its own; 1 without it. 0.5.23 has a flag for their number."""
    groups = getattr(server_args, "attn_dp_size", 1)
    return int(groups if groups > 1 or not server_args.enable_dp_attention else server_args.dp_size)


def attention_ranks(server_args: Any) -> int:
    """Ranks that share the heads of one request's attention."""
    return int(server_args.tp_size // attention_groups(server_args) // getattr(server_args, "attn_cp_size", 1))


def server_problems(server_args: Any, device: str) -> list[str]:
    """Reasons in SGLang's server arguments, whatever the method."""
    found = []
    if not decodes_sparsely(server_args):
        found.append(
            f"--prefill-attention-backend {BACKEND}: only decode is sparse; name it with --attention-backend or "
            "--decode-attention-backend"
        )
    if server_args.pp_size > 1:
        found.append(
            f"--pp-size {server_args.pp_size}: a stage without the selection layers has no set; use --tp-size instead"
        )
    found += group_problems(server_args, device)
    if getattr(server_args, "dcp_size", 1) > 1:
        found.append("--dcp-size above 1 splits a request's KV over ranks; leave it at 1")
    for name in ("enable_two_batch_overlap", "enable_pdmux"):
        if getattr(server_args, name, False):
            found.append(f"--{name.replace('_', '-')} runs several backends at once; leave the flag out")
    if getattr(server_args, "enable_hisparse", False):
        found.append("--enable-hisparse moves tokens of running requests out of the KV pool; leave the flag out")
    if str(server_args.kv_cache_dtype).startswith(("fp4", "nvfp4")):
        found.append(f"--kv-cache-dtype {server_args.kv_cache_dtype}: packed fp4 KV; use auto or fp8_e4m3")
    # SGLang gives layers these scales in a form that attention backends do not read.
    if getattr(server_args, "quantization_param_path", None) and str(server_args.kv_cache_dtype).startswith("fp8"):
        found.append(
            "--quantization-param-path with fp8 KV: the scales that it names reach no attention backend; take a "
            "checkpoint that holds its KV scales, or --kv-cache-dtype auto"
        )
    return found


def group_problems(server_args: Any, device: str) -> list[str]:
    """Reasons in DP attention. Where each group is one GPU, ranks choose sets alone, as without it."""
    groups, ranks = attention_groups(server_args), attention_ranks(server_args)
    if groups == 1:
        return []
    asked = "--enable-dp-attention (or --attn-dp-size above 1)"
    if device == "cpu":
        return [f"{asked}: SGLang gathers the groups' tokens on GPUs alone; on a CPU leave the flag out"]
    if ranks > 1:
        return [
            f"{asked}: {ranks} ranks in each of {groups} groups would choose sets together, which is not verified; "
            f"make as many groups as --tp-size {server_args.tp_size} has ranks, or leave the flag out"
        ]
    return []


def head_problems(model: Any, tp_size: int, device: str) -> list[str]:
    """Reasons why so many ranks of one group cannot share the model's heads; SGLang would find out later.

    On a GPU several ranks may hold the same KV head. On a CPU SGLang gives the model heads without weights until the
    ranks share KV heads evenly, and these would choose tokens like all others.
    """
    if tp_size == 1:
        return []
    heads, kv_heads = model.num_attention_heads, model.get_total_num_kv_heads()
    repeated = device != "cpu"
    fitting = [
        ranks
        for ranks in range(1, heads + 1)
        if heads % ranks == 0 and (kv_heads % ranks == 0 or (repeated and ranks % kv_heads == 0))
    ]
    if tp_size in fitting:
        return []
    return [
        f"--tp-size {tp_size} does not share {heads} query heads and {kv_heads} KV heads evenly; "
        f"use {' or '.join(map(str, fitting))}"
    ]


def speculation_problems(server_args: Any, device: str) -> list[str]:
    """Reasons in speculative decoding: what a device cannot do, and what would leave nothing sparse."""
    algorithm = server_args.speculative_algorithm
    if not algorithm:
        return []
    if drafts.is_lossless(server_args):
        # What does not go with it was refused where SGLang resolved its flags (`drafts.problems`).
        return []
    asked = f"--speculative-algorithm {algorithm}"
    if device == "cpu":
        return [
            f"{asked}: SGLang speculates on GPUs alone; on a CPU leave it out, or take {drafts.ALGORITHM}, by which "
            "this backend drafts for itself"
        ]
    if algorithm == "NGRAM":
        return [f"{asked} has no draft model, and verifies densely, so that nothing would be sparse; leave it out"]
    if server_args.speculative_draft_attention_backend in (None, BACKEND):
        return [f"{asked} would draft with this backend; name a dense one with --speculative-draft-attention-backend"]
    return []


def device_problems(dense: str | None, server_args: Any, device: str) -> list[str]:
    """Reasons in the dense backend that was asked for, None by default, and in what a device can do."""
    found = []
    if dense is not None and dense not in DENSE_BACKENDS:
        found.append(f"--lim-dense-backend must be one of {', '.join(DENSE_BACKENDS)}, got {dense!r}")
    if device == "cpu":
        if dense not in (None, "torch_native"):
            found.append(f"--lim-dense-backend {dense} needs a GPU; on a CPU leave it out")
        if getattr(server_args, "enable_torch_compile", False):
            found.append("--enable-torch-compile captures decode on CPU, where sets vary in place; leave the flag out")
        adapters = getattr(server_args, "enable_lora", None) or getattr(server_args, "lora_paths", None)
        if adapters and server_args.lora_backend != "torch_native":
            found.append(f"--lora-backend {server_args.lora_backend} needs Triton; on a CPU use torch_native")
    elif device == "cuda":
        e5m2 = str(server_args.kv_cache_dtype) == "fp8_e5m2"
        if e5m2 and (dense or default_dense_backend(device)) == "fa3":
            found.append("--kv-cache-dtype fp8_e5m2 is not read by fa3; use fp8_e4m3 or --lim-dense-backend triton")
        if os.environ.get("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "0").lower() in ("1", "true", "yes", "y"):
            found.append(
                "SGLANG_ENABLE_METADATA_GLUE_GRAPH records a step's preparation, which must run anew; unset it"
            )
        if dense == "torch_native":
            found.append("--lim-dense-backend torch_native runs outside CUDA graphs; on a GPU leave it out")
    else:
        found.append(f"--device {device} is not supported; use cuda or cpu")
    return found


def unseen_writes_problems(method: Method, server_args: Any) -> list[str]:
    """Reasons in SGLang's server arguments for each flag that makes us see all that prefills write here.

    These are flags by which sets outlive a step, and methods that know of each page what it holds. KV that is loaded or
    transferred before a request decodes is learnt then (`sgl_lim.serving.arrivals`).
    """
    if (server_args.prefill_attention_backend or server_args.attention_backend) == BACKEND:
        return []
    return [
        f"{one} has to see which KV slots a prefill writes; name this backend with --attention-backend"
        for one in method.flags_that_follow_writes()
    ]


def page_problems(method: Method, server_args: Any, page_size: int) -> list[str]:
    """Reasons why a method that chooses pages cannot have the server's."""
    if method.page == 1:
        return []
    name, page, found = f"--lim-method {method.name}", method.page, []
    if page_size % page:
        found.append(
            f"--page-size {page_size}: {name} chooses pages of {page} tokens, which have to lie together; "
            f"use --page-size {page}"
        )
    if server_args.speculative_algorithm and not drafts.is_lossless(server_args):
        found.append(
            f"--speculative-algorithm {server_args.speculative_algorithm}: {name} learns from the keys of tokens that "
            "verification may take back; leave one of them out"
        )
    return found


def warn_if_always_dense(config: LimConfig, model: Any) -> None:
    """Say so where no request can outgrow the budget.

    Args:
        model: SGLang's model config.
    """
    method = config.build()
    has_budget = "budget" in parameters_of(type(method))
    if has_budget and method.budget >= model.context_len:
        logger.warning(
            "sgl-lim: --lim-budget %d is no less than the context of %d tokens, so that all decode is dense; lower it",
            method.budget,
            model.context_len,
        )


def warn_if_unused(flags: Sequence[str], server_args: Any) -> None:
    """Say so where flags of ours were given, and no attention backend flag names ours.

    Args:
        flags: as typed; server_args: SGLang's, or its parser's namespace.
    """
    if flags and not names_us(server_args):
        logger.warning(
            "sgl-lim: %s without --attention-backend %s: decode stays dense, and the flags do nothing",
            ", ".join(flags),
            BACKEND,
        )


def check_pool(pool: Any) -> None:
    """Refuse KV pools that are not plain token-major (NHD) keys and values. Raises `RefusedConfig`.

    Pools exist only once weights are loaded; what a flag or the model's config tells was refused before.
    """
    from sglang.srt.mem_cache import memory_pool

    packed = tuple(
        getattr(memory_pool, name)
        for name in ("MHATokenToKVPoolFP4", "MHATokenToKVPoolMXFP8")
        if hasattr(memory_pool, name)
    )
    if not isinstance(pool, memory_pool.MHATokenToKVPool):
        raise RefusedConfig([f"KV pool {type(pool).__name__}: only models with plain MHA, GQA or MQA caches work"])
    if isinstance(pool, packed):
        raise RefusedConfig([f"KV pool {type(pool).__name__} packs blocks; use --kv-cache-dtype auto or fp8_e4m3"])
    layout = getattr(pool, "kv_cache_layout", "nhd")
    if layout != "nhd":
        raise RefusedConfig([f"KV layout {layout!r}: only 'nhd' works; unset SGLANG_USE_HND_KVCACHE and layout flags"])
