"""Write a model as an ordinary Hugging Face Qwen3 folder: bfloat16 weights, configs, tokenizer."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .model import Shape, SmallQwen3


class SpecialIds(NamedTuple):
    """Token ids that configurations name."""

    bos: int
    eos: int
    pad: int


def model_config(shape: Shape, tokens: SpecialIds, max_positions: int) -> dict[str, object]:
    """config.json in the form of the published Qwen3 checkpoints, which both Transformers 4 and 5 read."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": max_positions,
        "max_window_layers": shape.layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": tokens.pad,
        "rms_norm_eps": shape.eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def save_weights(model: SmallQwen3, folder: Path, parts: int) -> None:
    """Write bfloat16 weights: model.safetensors, or `parts` shards of about equal size with their index."""
    state = {n: w.to("cpu", torch.bfloat16).contiguous() for n, w in model.hf_state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name in sorted(state, key=lambda n: -state[n].numel()):
        min(shards, key=lambda s: sum(w.numel() for w in s.values()))[name] = state[name]
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    if parts == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
    if parts > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in sorted(shard)}
        size = sum(w.numel() * w.element_size() for w in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        _write(folder / "model.safetensors.index.json", index)


def export_model(
    model: SmallQwen3,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    tokens: SpecialIds,
    special: dict[str, str],
    max_positions: int,
    parts: int = 1,
    compact: bool = False,
) -> None:
    """Write weights, config.json, generation_config.json (greedy), tokenizer.json and tokenizer_config.json.

    Args:
        special: names of special tokens as tokenizer_config.json spells them, `{"bos_token": "<bos>", …}`.
        compact: without line breaks in tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder, parts)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=not compact)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    _write(folder / "config.json", model_config(model.shape, tokens, max_positions))
    _write(folder / "generation_config.json", {**ids, "do_sample": False})
    _write(folder / "tokenizer_config.json", tokenizer_config)


def _write(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
