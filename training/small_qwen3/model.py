"""A Qwen3 of any small size in plain PyTorch, with attention left to the caller.

Training closes layers to the context and evaluation restricts rows to selected tokens, so the decoder layer is cut
around its attention: `project` gives q, k, v, anything may attend, `finish` does the rest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by Transformers' meaning of its Qwen3 configuration."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float = 1e6
    eps: float = 1e-6

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class LayerWeights(NamedTuple):
    """One decoder layer's weights; linear weights are [out, in] as in Hugging Face checkpoints."""

    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor
    k_norm: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


HF_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32, returned in `dtype`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., L, D] with cos, sin float32 [L, D] (halves repeated, Hugging Face layout)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope_table(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [L, head_dim], for integer positions [L]."""
    exponents = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angles = positions.float()[:, None] * shape.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def project(
    x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor, shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, heads, L, D], k and v [B, kv_heads, L, D] in `dtype` from the residual stream x [B, L, hidden]."""
    batch, length, _ = x.shape
    normed = rms_norm(x, w.attn_norm, shape.eps, dtype)
    qkv = F.linear(normed, torch.cat((w.q, w.k, w.v)).to(dtype)).view(batch, length, -1, shape.head_dim)
    q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)
    q = rotate(rms_norm(q, w.q_norm, shape.eps, dtype).transpose(1, 2), cos, sin)
    k = rotate(rms_norm(k, w.k_norm, shape.eps, dtype).transpose(1, 2), cos, sin)
    return q, k, v.transpose(1, 2)


def finish(x: Tensor, attended: Tensor, w: LayerWeights, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The layer's output [B, L, hidden] from its input x and what its heads attended to [B, heads, L, D]."""
    x = x + F.linear(attended.transpose(1, 2).flatten(2), w.o.to(dtype))
    normed = rms_norm(x, w.ffn_norm, shape.eps, dtype)
    gate, up = F.linear(normed, torch.cat((w.gate, w.up)).to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w.down.to(dtype))


class SmallQwen3(nn.Module):
    """Weights of a model. The residual stream has the weights' dtype; matrix products run in `dtype`."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        s = self.shape
        sizes: dict[str, tuple[int, ...]] = {
            "attn_norm": (s.hidden,),
            "q": (s.heads * s.head_dim, s.hidden),
            "k": (s.kv_heads * s.head_dim, s.hidden),
            "v": (s.kv_heads * s.head_dim, s.hidden),
            "q_norm": (s.head_dim,),
            "k_norm": (s.head_dim,),
            "o": (s.hidden, s.heads * s.head_dim),
            "ffn_norm": (s.hidden,),
            "gate": (s.ffn, s.hidden),
            "up": (s.ffn, s.hidden),
            "down": (s.hidden, s.ffn),
        }
        self.embed = nn.Parameter(torch.empty(s.vocab, s.hidden))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        self.layers = nn.ModuleList(
            nn.ParameterDict({n: nn.Parameter(torch.empty(z)) for n, z in sizes.items()}) for _ in range(s.layers)
        )

    @torch.no_grad()
    def initialise(self, qk_norm: float = 1.7) -> None:
        """Draw fresh weights. With qk-norm weights of 1.0 the chain tracer did not retrieve within 3,200 steps."""
        nn.init.normal_(self.embed, std=0.02)
        for i in range(self.shape.layers):
            for name, weight in self.weights(i)._asdict().items():
                if weight.ndim == 1:
                    weight.fill_(qk_norm if name in ("q_norm", "k_norm") else 1.0)
                else:
                    depth = (2 * self.shape.layers) ** -0.5 if name in ("o", "down") else 1.0
                    nn.init.normal_(weight, std=depth * weight.shape[1] ** -0.5)

    def weights(self, layer: int) -> LayerWeights:
        """The parameters of one layer themselves, not copies."""
        parameters = self.layers[layer]
        return LayerWeights(**{name: getattr(parameters, name) for name in LayerWeights._fields})

    def logits(self, x: Tensor) -> Tensor:
        """float32 logits [..., vocab] of residual rows [..., hidden]; the embedding is tied."""
        normed = rms_norm(x, self.norm, self.shape.eps, self.dtype)
        return F.linear(normed, self.embed.to(self.dtype)).float()

    def forward(self, tokens: Tensor) -> Tensor:
        """Dense causal logits, float32 [B, L, vocab], of token ids [B, L]."""
        x = self.embed[tokens]
        cos, sin = rope_table(torch.arange(tokens.shape[1], device=tokens.device), self.shape)
        for i in range(self.shape.layers):
            w = self.weights(i)
            q, k, v = project(x, w, cos, sin, self.shape, self.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = finish(x, attended, w, self.shape, self.dtype)
        return self.logits(x)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under Hugging Face Qwen3 names (no `lm_head`: it is tied)."""
        state = {"model.embed_tokens.weight": self.embed.detach(), "model.norm.weight": self.norm.detach()}
        for i in range(self.shape.layers):
            for name, weight in self.weights(i)._asdict().items():
                state[f"model.layers.{i}.{HF_NAMES[name]}"] = weight.detach()
        return state

    @torch.no_grad()
    def load_hf_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy weights in; raises KeyError if one is missing."""
        for name, weight in self.hf_state_dict().items():
            weight.copy_(state[name])


def save_checkpoint(model: SmallQwen3, folder: Path, parts: int = 3) -> None:
    """Write float32 weights as `parts` safetensors files, small enough to bring back from any GPU host."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(model.hf_state_dict())
    for i in range(parts):
        part = {n: model.hf_state_dict()[n].float().cpu().contiguous() for n in names[i::parts]}
        save_file(part, folder / f"part{i}.safetensors")


def load_checkpoint(model: SmallQwen3, folder: Path) -> None:
    """Read every safetensors file of a folder into the model: a training checkpoint or the published one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    model.load_hf_state_dict(state)
