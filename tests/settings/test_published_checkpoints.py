"""Models that need no code of their own: would a server take them, by the configs that they are published with?"""

import json
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig

from sgl_lim.evaluate.checkpoint import load_config
from sgl_lim.settings.architectures import architecture_problems
from sgl_lim.settings.config import configure
from sgl_lim.settings.layers import resolve_layers
from sgl_lim.settings.refusals import head_problems, model_problems

LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + n for n in range(48)]}


def shape(kind: str, architecture: str, sizes: tuple[int, ...], context: int, **more: Any) -> dict[str, Any]:
    """A config; `sizes` are layers, query heads, KV heads, hidden size and vocabulary."""
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
    told = dict(zip(names, sizes, strict=True)) | {"model_type": kind, "architectures": [architecture]}
    return {
        **told,
        "intermediate_size": 3 * sizes[3],
        "max_position_embeddings": context,
        "torch_dtype": "bfloat16",
        **more,
    }


def llama(*sizes: int) -> dict[str, Any]:
    more = {"rope_scaling": LLAMA_ROPE, "rope_theta": 500000.0}
    return shape("llama", "LlamaForCausalLM", sizes, 131072, **more)


def qwen2(*sizes: int, context: int, **more: Any) -> dict[str, Any]:
    """With the window that Qwen's configs name and do not use."""
    window = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": sizes[0]}
    return shape("qwen2", "Qwen2ForCausalLM", sizes, context, rope_theta=1e6, **window, **more)


def qwen3_moe(*sizes: int, **more: Any) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
    return shape("qwen3_moe", "Qwen3MoeForCausalLM", sizes, 40960, **experts, **more)


CHECKPOINTS = {
    "Qwen/Qwen3-30B-A3B": qwen3_moe(48, 32, 4, 2048, 151936),
    "Qwen/Qwen3-235B-A22B": qwen3_moe(94, 64, 4, 4096, 151936),
    "meta-llama/Llama-3.1-8B-Instruct": llama(32, 32, 8, 4096, 128256),
    "meta-llama/Llama-3.1-70B-Instruct": llama(80, 64, 8, 8192, 128256),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": llama(32, 32, 8, 4096, 128256),
    "Qwen/Qwen2.5-7B-Instruct": qwen2(28, 28, 4, 3584, 152064, context=32768),
    "Qwen/QwQ-32B": qwen2(64, 40, 8, 5120, 152064, context=40960),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": qwen2(48, 40, 8, 5120, 152064, context=131072),
    "microsoft/Phi-4-mini-instruct": shape(
        *("phi3", "Phi3ForCausalLM", (32, 24, 8, 3072, 200064), 131072),
        sliding_window=262144,
        original_max_position_embeddings=4096,
        rope_scaling=LONG_ROPE,
        partial_rotary_factor=0.75,
        pad_token_id=199999,
        bos_token_id=199999,
        eos_token_id=199999,
    ),
}
PRESETS = {"DeepSeek-R1-Distill-Llama-8B": (2, 13)}
"""What the paper measured of these."""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_server_would_take_it(name: str, tmp_path: Path) -> None:
    folder, config = tmp_path / name.split("/")[1], CHECKPOINTS[name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(model_path=str(folder))
    assert architecture_problems(model) == [] == model_problems(configure(), model)
    load_config(str(folder))
    layers, depth = resolve_layers(configure(), model), config["num_hidden_layers"]
    chosen = layers.parameters["selection_layers"]
    assert chosen[0] > 0 and chosen[-1] < depth and PRESETS.get(folder.name, chosen) == chosen
    # A KV head is one rank's, and beyond that several ranks have the same one.
    kv_heads = config["num_key_value_heads"]
    fitting = [ranks for ranks in (1, 2, 4, 8) if not head_problems(model, ranks, "cuda")]
    assert fitting == [
        r for r in (1, 2, 4, 8) if config["num_attention_heads"] % r == 0 and (r <= kv_heads or r % kv_heads == 0)
    ]
