"""Qwen3 decoding in float64, one token at a time, dense or over given sets: what a server should compute.

Written from the model's definition on nothing but torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Sets = list[list[int]]
"""Ascending positions: one list for all heads, or one for each KV head, all of one length."""
ChooseSet = Callable[[int, int], Sets | None]
"""From a layer and the context's length, what this layer attends to; None is everything."""


@dataclass
class _Cache:
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Float64Qwen3:
    """A checkpoint's weights, rounded to the dtype that a server serves and then widened."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from safetensors.torch import load_file

        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self._weights = {name.removeprefix("model."): w.to(dtype).double() for name, w in weights.items()}
        rope = self.config.get("rope_parameters") or self.config
        self._theta = float(rope["rope_theta"])
        self._layers = self.config["num_hidden_layers"]

    def logprobs(self, prompt: Sequence[int], generated: Sequence[int], choose: ChooseSet | None = None) -> Tensor:
        """Log-probabilities [len(generated), vocabulary] before each generated token.

        The prompt runs dense, as prefill does; each later token is one decode step over the sets of `choose`.
        """
        cache = [_Cache() for _ in range(self._layers)]
        rows = [self._forward(torch.tensor(list(prompt)), 0, cache, None)[-1]]
        for i, token in enumerate(generated[:-1]):
            rows.append(self._forward(torch.tensor([token]), len(prompt) + i, cache, choose)[-1])
        return torch.stack(rows)

    def _forward(self, tokens: Tensor, start: int, cache: list[_Cache], choose: ChooseSet | None) -> Tensor:
        w, eps = self._weights, self.config["rms_norm_eps"]
        x = w["embed_tokens.weight"][tokens]
        for i in range(self._layers):
            at = f"layers.{i}."
            h = _norm(x, w[at + "input_layernorm.weight"], eps)
            q, k, v = (self._heads(h @ w[f"{at}self_attn.{p}_proj.weight"].T) for p in "qkv")
            q = self._rotate(_norm(q, w[at + "self_attn.q_norm.weight"], eps), start)
            k = self._rotate(_norm(k, w[at + "self_attn.k_norm.weight"], eps), start)
            cache[i].keys.append(k)
            cache[i].values.append(v)
            kept = None if choose is None else choose(i, start + 1)
            out = self._attend(q, torch.cat(cache[i].keys), torch.cat(cache[i].values), start, kept)
            x = x + out @ w[at + "self_attn.o_proj.weight"].T
            h = _norm(x, w[at + "post_attention_layernorm.weight"], eps)
            gate, up = (h @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
        x = _norm(x, w["norm.weight"], eps)
        head = w.get("lm_head.weight", w["embed_tokens.weight"])
        return torch.log_softmax(x @ head.T, dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.config["head_dim"])

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        half = x.shape[-1] // 2
        frequencies = self._theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = (start + torch.arange(x.shape[0], dtype=torch.float64))[:, None] * frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int, kept: Sets | None) -> Tensor:
        """q [T, H, D] over keys and values [L, H_kv, D] → [T, H·D]; causal, or one query over the positions `kept`."""
        if kept is not None:
            sets = kept if len(kept) > 1 else kept * keys.shape[1]
            keys, values = (torch.stack([x[held, n] for n, held in enumerate(sets)], dim=1) for x in (keys, values))
        group = q.shape[1] // keys.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
        logits = q.transpose(0, 1) @ k.transpose(1, 2) * self.config["head_dim"] ** -0.5
        if kept is None:
            ahead = torch.arange(keys.shape[0]) > start + torch.arange(q.shape[0])[:, None]
            logits = logits.masked_fill(ahead, float("-inf"))
        return (logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
