"""One update of the source reader, and what a run keeps between processes."""

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from small_qwen3.attention import causal_kernel
from small_qwen3.masks import attend
from small_qwen3.model import LayerWeights, SmallQwen3, finish, project, rms_norm, rope_table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .batches import IGNORE, Mixture
from .masks import ClosedMask, draw_open_layers
from .muon import Optimiser

MASK_STEPS = 8  # batches of one closed mask: building one costs the device a millisecond
FOUND = ("text", "chains", "chain words")  # losses of both kinds of row, and how many chain tokens are right


def token_loss(
    x: Tensor, norm: Tensor, embed: Tensor, targets: Tensor, text: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean loss of residual rows x [N, hidden] against targets [N], and float32 [3]: what `FOUND` names.

    The first `text` rows are of text, the others of chains.
    """
    logits = F.linear(rms_norm(x, norm, eps, dtype), embed.to(dtype)).float()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    asked = targets != IGNORE
    chains = asked[text:].sum().clamp(min=1)
    right = (logits[text:].detach().argmax(-1) == targets[text:]).sum()
    found = [losses[:text].mean(), losses[text:].sum() / chains, right / chains]
    return losses.sum() / asked.sum(), torch.stack(found).detach()


class Trainer:
    """Model, optimiser and compiled pieces of one run."""

    def __init__(
        self,
        model: SmallQwen3,
        optimiser: Optimiser,
        mixtures: dict[int, Mixture],
        *,
        chain_share: float,
        closed_length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.optimiser, self.mixtures, self.device = model, optimiser, mixtures, device
        self.text_share = 1 - chain_share
        self.batches = dict.fromkeys(mixtures, 0)
        self.steps = 0
        self.tokens = 0
        self.rng = random.Random(seed)
        self.closed = ClosedMask(closed_length, device)
        self.closed.draw(self.rng)
        self._ropes = {n: rope_table(torch.arange(n, device=device), model.shape) for n in mixtures}
        self.use_kernel("flash" if device.type == "cuda" else "math")

    def use_kernel(self, name: str) -> None:
        """Take a causal attention kernel for open layers; compiled pieces are compiled anew."""
        self.kernel = name
        torch._dynamo.reset()
        compiled: Callable = torch.compile if self.device.type == "cuda" else lambda f, **_: f
        shape, dtype = self.model.shape, self.model.dtype

        def open_layer(x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = project(x, w, cos, sin, shape, dtype)
            return finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), w, shape, dtype)

        def closed_layer(x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor) -> Tensor:
            q, k, v = project(x, w, cos, sin, shape, dtype)
            return finish(x, attend(q, k, v, mask), w, shape, dtype)

        self._open_layer = compiled(open_layer, dynamic=False, fullgraph=True)
        self._closed_layer = compiled(closed_layer, dynamic=False, fullgraph=True)
        self._loss = compiled(token_loss, dynamic=False)

    def attention(self) -> AbstractContextManager[None]:
        """The context that open layers run in."""
        return causal_kernel(self.kernel)

    def warm_up(self, closing: bool) -> None:
        """Compile what the run will use, by passes whose gradients are dropped."""
        for length in self.mixtures:
            self._backward(length, frozenset(range(self.model.shape.layers)))
        if closing:
            self._backward(self.closed.length, frozenset({0}))
        for weight in self.model.parameters():
            weight.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, length: int, factor: float, *, closing: bool) -> tuple[Tensor, bool]:
        """One update with rows of `length` tokens; returns what `FOUND` names and whether layers closed."""
        layers = self.model.shape.layers
        if closing and self.steps % MASK_STEPS == 0:
            self.closed.draw(self.rng)
        open_layers = draw_open_layers(self.rng, layers) if closing else frozenset(range(layers))
        found = self._backward(length, open_layers)
        self.optimiser.step(factor)
        self.batches[length] += 1
        self.steps += 1
        return found, len(open_layers) < layers

    def _backward(self, length: int, open_layers: frozenset[int]) -> Tensor:
        tokens, targets = self.mixtures[length].batch(self.batches[length])
        self.tokens += tokens.numel()
        x = F.embedding(tokens, self.model.embed)
        for i in range(self.model.shape.layers):
            layer = x, self.model.weights(i), *self._ropes[length]
            x = self._open_layer(*layer) if i in open_layers else self._closed_layer(*layer, self.closed.mask)
        text = round(len(tokens) * self.text_share) * length
        operands = x.flatten(0, 1), self.model.norm, self.model.embed, targets.flatten()
        loss, found = self._loss(*operands, text, self.model.shape.eps, self.model.dtype)
        loss.backward()
        return found

    def save(self, file: Path, **more: object) -> None:
        """Write everything that a later process needs to go on; a process killed meanwhile leaves the last file."""
        state = {
            "weights": self.model.hf_state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "batches": self.batches,
            "steps": self.steps,
            "tokens": self.tokens,
            "rng": self.rng.getstate(),
            **more,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, file)

    def load(self, state: dict) -> None:
        """Go on from a state."""
        self.model.load_hf_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.batches, self.steps, self.tokens = state["batches"], state["steps"], state["tokens"]
        self.rng.setstate(state["rng"])
