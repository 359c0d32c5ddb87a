"""A preset file as a calibration writes it."""

from types import SimpleNamespace

import pytest
from transformers import PretrainedConfig

from sgl_lim.settings.preset_file import Entry, PresetFile

RULE = {"method": "lessismore", "aggregate": "union", "recency": 0.25, "sinks": 4, "scope": "global"}


@pytest.fixture
def preset() -> PresetFile:
    """Other layers at each of three budgets, for a model of 12 layers."""
    entries = tuple(
        Entry(budget, layers, attends, {"agreement": 0.95, "tokens": 100})
        for budget, layers, attends in ((64, (2, 8), "context"), (256, (1, 7), "set"), (1024, (0, 5), "context"))
    )
    return PresetFile("Qwen3ForCausalLM", 12, entries, RULE, {"model": "some"})


@pytest.fixture
def preset_path(preset, tmp_path) -> str:
    """The preset in a file."""
    preset.write(tmp_path / "preset.json")
    return str(tmp_path / "preset.json")


@pytest.fixture
def model_of():
    """Makes as much of SGLang's model config as presets look at."""
    from sglang.srt.configs.model_config import AttentionArch

    def make(layers=12, architectures=("Qwen3ForCausalLM",), path="some/model"):
        return SimpleNamespace(
            model_path=path,
            num_hidden_layers=layers,
            hf_config=PretrainedConfig(architectures=list(architectures) or None),
            hf_text_config=PretrainedConfig(),
            linear_attn_registry_result=None,
            context_len=8192,
            attention_arch=AttentionArch.MHA,
            is_encoder_decoder=False,
            is_hybrid_swa=False,
            sliding_window_size=None,
        )

    return make


@pytest.fixture
def model(model_of):
    """The model that the preset was made for."""
    return model_of()
