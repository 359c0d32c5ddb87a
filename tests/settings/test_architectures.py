"""The most served architectures, each by a small config alone: which of them can decode sparsely?"""

import json
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig

from sgl_lim.evaluate.checkpoint import load_config
from sgl_lim.evaluate.step_rows import UnsupportedModel
from sgl_lim.settings.architectures import architecture_problems

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
UNUSED_WINDOW = {"sliding_window": 4096, "use_sliding_window": False}
SERVED = [
    ("LlamaForCausalLM", "llama", {}),
    ("Qwen2ForCausalLM", "qwen2", UNUSED_WINDOW),
    ("Qwen3ForCausalLM", "qwen3", UNUSED_WINDOW),
    ("Qwen3MoeForCausalLM", "qwen3_moe", UNUSED_WINDOW),
    ("MistralForCausalLM", "mistral", {"sliding_window": None}),
    ("MixtralForCausalLM", "mixtral", {"sliding_window": None}),
    # Phi-4-mini-reasoning: the window is twice as long as any context.
    ("Phi3ForCausalLM", "phi3", {"sliding_window": 16384}),
    ("Glm4ForCausalLM", "glm4", {}),
    ("Glm4MoeForCausalLM", "glm4_moe", {}),
    ("Olmo2ForCausalLM", "olmo2", {}),
    ("GraniteForCausalLM", "granite", {}),
    ("Ernie4_5ForCausalLM", "ernie4_5", {}),
    ("MiniMaxM2ForCausalLM", "minimax_m2", {}),
]
REFUSED = [
    ("DeepseekV3ForCausalLM", "deepseek_v3", MLA, "MLA"),
    ("MistralForCausalLM", "mistral", {"sliding_window": 4096}, "sliding-window"),
    ("Phi3ForCausalLM", "phi3", {"sliding_window": 2047}, "sliding-window"),
    ("GptOssForCausalLM", "gpt_oss", {}, "sliding-window"),
    ("Gemma2ForCausalLM", "gemma2", {}, "sliding-window"),
    ("Gemma3ForCausalLM", "gemma3_text", {"sliding_window": 8192}, "sliding-window"),
    ("Cohere2ForCausalLM", "cohere2", {}, "sliding-window"),
    ("Llama4ForConditionalGeneration", "llama4", {}, "sliding-window"),
    ("Qwen3NextForCausalLM", "qwen3_next", {}, "linear attention"),
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", {}, "linear attention"),
    ("FalconH1ForCausalLM", "falcon_h1", {}, "Mamba"),
    ("NemotronHForCausalLM", "nemotron_h", {}, "Mamba"),
    ("Lfm2ForCausalLM", "lfm2", CONVOLUTIONS, "convolution"),
]


def written(folder: Path, architecture: str, kind: str, more: dict[str, Any]) -> str:
    config = {**SIZES, "architectures": [architecture], "model_type": kind, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("architecture", "kind", "more"), SERVED, ids=lambda one: one if isinstance(one, str) else "")
def test_served(architecture: str, kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, architecture, kind, more)
    assert architecture_problems(ModelConfig(model_path=path)) == []
    load_config(path)


@pytest.mark.parametrize(
    ("architecture", "kind", "more", "reason"), REFUSED, ids=lambda one: one if isinstance(one, str) else ""
)
def test_refused(architecture: str, kind: str, more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, architecture, kind, more)
    (problem,) = architecture_problems(ModelConfig(model_path=path))
    assert reason in problem and problem.endswith("serve it with a dense --attention-backend")
    with pytest.raises(UnsupportedModel):
        load_config(path)
