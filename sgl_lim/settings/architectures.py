"""Which models sparse decode can serve, told by their config alone."""

from typing import Any

_USE_DENSE = "serve it with a dense --attention-backend"
_WINDOWED = {"sliding_attention", "chunked_attention"}
"""Kinds of layers, by their names in a config, whose attention the model itself bounds."""


def architecture_problems(model: Any) -> list[str]:
    """Why a model's layers are none that sparse decode serves; each reason with a way out.

    Args:
        model: SGLang's model config.
    """
    from sglang.srt.configs.model_config import AttentionArch

    found = []
    if model.attention_arch == AttentionArch.MLA:
        found.append(f"MLA models keep one latent per token and have no KV heads to gather; {_USE_DENSE}")
    if model.is_encoder_decoder:
        found.append(f"encoder-decoder models attend across two contexts; {_USE_DENSE}")
    if keeps_states(model):
        found.append(f"layers of linear attention, Mamba or convolution keep a state and no tokens; {_USE_DENSE}")
    elif drops_tokens(model):
        found.append(f"sliding-window or hybrid attention already drops tokens by layer; {_USE_DENSE}")
    return found


def keeps_states(model: Any) -> bool:
    """Whether SGLang runs some layers of the model by its backend for linear attention and state-space layers."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


def drops_tokens(model: Any) -> bool:
    """Whether some layers do not see the whole context. A window that no context outgrows drops nothing."""
    if model.is_hybrid_swa or _WINDOWED & set(getattr(model.hf_text_config, "layer_types", None) or ()):
        return True
    return 0 < (model.sliding_window_size or 0) < model.context_len
