"""Random-weight checkpoints over the chain task's vocabulary, for tests that need a model's shape and not its skill."""

import json
from pathlib import Path
from typing import Any

from sgl_lim.tasks.chains import vocabulary
from support.wide_weights import draw_wide


def write_tiny_model(
    folder: Path,
    *,
    layers: int = 6,
    hidden: int = 128,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 32,
    context: int = 4096,
    seed: int = 0,
) -> Path:
    """Write a Qwen3 checkpoint (float32, word-level tokenizer) and return `folder`.

    Weights are drawn wider than usual, so that attention is peaked and a wrong token set changes the output.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": head_dim}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": context}
    return _write(folder, Qwen3Config, Qwen3ForCausalLM, shape, seed)


def write_tiny_moe(
    folder: Path, *, layers: int = 6, head_dim: int = 32, experts: int = 8, chosen: int = 2, seed: int = 0
) -> Path:
    """Write a Qwen3-MoE checkpoint of the same attention as `write_tiny_model`, and return `folder`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 256, "head_dim": head_dim}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    shape |= {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": 64}
    # SGLang reads the output matrix of this architecture from the checkpoint, tied or not.
    shape |= {"tie_word_embeddings": False}
    return _write(folder, Qwen3MoeConfig, Qwen3MoeForCausalLM, shape, seed)


def _write(folder: Path, config: Any, model_class: Any, shape: dict[str, Any], seed: int) -> Path:
    import torch

    words = vocabulary()
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": words.index(f"<{name}>") for name in ("bos", "eos", "pad")}
    model = model_class(config(**{"vocab_size": len(words), "tie_word_embeddings": True, **ids, **shape}))
    draw_wide(model, qk_norms=1.7)
    model.save_pretrained(folder)
    _write_tokenizer(folder, words)
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|v\d+|\d+|->|[a-z]+|\S"), "removed", invert=True)
    bos = words.index("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
