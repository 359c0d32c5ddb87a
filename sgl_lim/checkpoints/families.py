"""Model families: what a GGUF file calls things and how Hugging Face does. Both are dense, with tied embeddings."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch

from sgl_lim.checkpoints.gguf_file import GgufFile

_SHARED = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


class Family(Protocol):
    """One architecture of GGUF files."""

    @property
    def names(self) -> dict[str, str]:
        """Modules of a layer: Hugging Face's name by that of the file."""
        ...

    def config(self, gguf: GgufFile) -> dict[str, Any]:
        """What `config.json` has beyond `shared_config`."""
        ...

    def weight(self, name: str, value: torch.Tensor, gguf: GgufFile) -> torch.Tensor:
        """The weight as Hugging Face's code wants it, from that of the file."""
        ...


@dataclass(frozen=True)
class Llama:
    """Llama and its like: rotary pairs lie side by side in the file, and half a head apart in Hugging Face's code."""

    @property
    def names(self) -> dict[str, str]:
        return {**_SHARED, "ffn_norm": "post_attention_layernorm"}

    def config(self, gguf: GgufFile) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "head_dim": gguf.of_model("embedding_length") // gguf.of_model("attention.head_count"),
        }

    def weight(self, name: str, value: torch.Tensor, gguf: GgufFile) -> torch.Tensor:
        counts = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
        module = name.split(".")[-2]
        if module not in counts:
            return value
        # (heads, half, 2, in) -> (heads, 2, half, in)
        heads = value.unflatten(0, (gguf.of_model(counts[module]), -1, 2))
        return heads.transpose(1, 2).reshape(value.shape)


@dataclass(frozen=True)
class Gemma3:
    """Gemma 3, text only: the file has the factor of each norm, Hugging Face what it is above 1."""

    @property
    def names(self) -> dict[str, str]:
        return {
            **_SHARED,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }

    def config(self, gguf: GgufFile) -> dict[str, Any]:
        head_dim, layers = gguf.of_model("attention.key_length"), gguf.of_model("block_count")
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "head_dim": head_dim,
            "query_pre_attn_scalar": head_dim,
            "rope_local_base_freq": 10000.0,  # not in the file: the same in all of Gemma 3
            "sliding_window": gguf.of_model("attention.sliding_window"),
            # Every sixth layer attends to the whole context.
            "layer_types": ["sliding_attention" if n % 6 else "full_attention" for n in range(1, layers + 1)],
        }

    def weight(self, name: str, value: torch.Tensor, gguf: GgufFile) -> torch.Tensor:
        return value - 1 if name.endswith("norm.weight") else value


FAMILIES: dict[str, Family] = {"llama": Llama(), "gemma3": Gemma3()}
"""By the architecture that a file names."""


def shared_config(gguf: GgufFile) -> dict[str, Any]:
    """What `config.json` of both families has."""
    return {
        "vocab_size": len(gguf["tokenizer.ggml.tokens"]),
        "hidden_size": gguf.of_model("embedding_length"),
        "intermediate_size": gguf.of_model("feed_forward_length"),
        "num_hidden_layers": gguf.of_model("block_count"),
        "num_attention_heads": gguf.of_model("attention.head_count"),
        "num_key_value_heads": gguf.of_model("attention.head_count_kv"),
        "max_position_embeddings": gguf.of_model("context_length"),
        "rms_norm_eps": float(f"{gguf.of_model('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, out of float32
        "rope_theta": gguf.of_model("rope.freq_base"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "transformers_version": version("transformers"),  # without it, transformers 5 warns of Mistral's tokenizers
    }


def hugging_face_name(name: str, family: Family) -> str:
    """Hugging Face's name of a weight of the file. Raises `KeyError` for a weight that the family does not have."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block, layer, module, kind = name.split(".")
    if block != "blk":
        raise KeyError(f"no weight {name} is known")
    return f"model.layers.{layer}.{family.names[module]}.{kind}"
