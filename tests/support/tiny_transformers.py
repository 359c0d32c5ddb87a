"""Small models of transformers with random weights."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Of Llama 3.1, over a shorter context, so that a test reaches beyond it."""
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
"""As Qwen's model cards recommend it for long contexts."""
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.3, 2.0, 4.0, 8.0, 16.0],
}
"""Of Phi-4-mini: three quarters of a head are rotated."""
LONG_WINDOW = {"rope_parameters": LONG_ROPE, "sliding_window": 1024, "pad_token_id": 0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA_ROPE}),
    "qwen2.5": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN, "use_sliding_window": False}),
    "phi-4-mini": (Phi3Config, Phi3ForCausalLM, LONG_WINDOW),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
}


def tiny(kind: str) -> Any:
    """Random weights, drawn wide, so that attention is peaked and a wrong set changes the logits."""
    config, model, more = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**SIZES, **more)).eval()
    draw_wide(made)
    return made
