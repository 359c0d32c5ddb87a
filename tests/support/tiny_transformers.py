"""Small models of transformers with random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from support.wide_weights import draw_wide

VOCABULARY, DEPTH = 512, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
KINDS: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny(kind: str) -> Any:
    """Random weights, drawn wide, so that attention is peaked and a wrong set changes the logits."""
    config, model = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**SIZES)).eval()
    draw_wide(made)
    return made
