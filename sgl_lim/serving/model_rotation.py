"""How a model of SGLang's rotates the queries and keys of each layer.

An attention backend gets them rotated. SGLang keeps a table of cosines and sines in the module `rotary_emb` beside each
layer's `RadixAttention`; both releases do, for every model whose decoder layer calls `get_rope`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lim_kernels.block_gates import Rotation


class UnknownRotation(ValueError):
    """A layer's rotation cannot be told; the message says which and why."""


@dataclass(frozen=True)
class LayerRotation:
    """One layer's rotation."""

    rotation: Rotation
    theta: float | None
    """Base of its frequencies; None where they are scaled."""


def rotations_of(model: Any, layers: list[int]) -> dict[int, LayerRotation]:
    """The rotation of each of some layers, read before the model ran first.

    Raises:
        UnknownRotation: a layer has none, or one that does not depend on one position alone.
    """
    modules = _rotary_modules(model)
    # Layers share one module, and then one table.
    known: dict[int, LayerRotation] = {}
    found = {}
    for layer in layers:
        module = modules.get(layer)
        if module is None:
            raise UnknownRotation(f"layer {layer} of {type(model).__name__} has no rotary_emb beside its attention")
        if id(module) not in known:
            known[id(module)] = _read(layer, module)
        found[layer] = known[id(module)]
    return found


def check_length(turned: LayerRotation, context: int) -> None:
    """Raise UnknownRotation unless the rotation of every position of a context is known."""
    known = len(turned.rotation.table)
    if known < context:
        raise UnknownRotation(
            f"a context of {context} tokens goes beyond the {known} positions whose rotation the model has; "
            f"use --context-length {known} or less, or --lim-method quest"
        )


def _rotary_modules(model: Any) -> dict[int, Any]:
    """`rotary_emb` by the number of the layer whose attention is its sibling."""
    found: dict[int, Any] = {}
    for parent in model.modules():
        rotary = getattr(parent, "rotary_emb", None)
        if rotary is not None:
            siblings = (getattr(child, "layer_id", None) for child in parent.children())
            found |= {layer: rotary for layer in siblings if isinstance(layer, int)}
    return found


def _read(layer: int, module: Any) -> LayerRotation:
    table = getattr(module, "cos_sin_cache", None)
    if table is None or table.dim() != 2 or getattr(module, "mrope_section", None):
        raise UnknownRotation(f"layer {layer} rotates by {type(module).__name__}, which is no table of positions")
    plain = type(module).__name__ == "RotaryEmbedding"
    # SGLang may bring its own to another dtype later.
    rotation = Rotation(table.detach().to(torch.float32, copy=True).contiguous(), not module.is_neox_style)
    return LayerRotation(rotation, float(module.base) if plain else None)
