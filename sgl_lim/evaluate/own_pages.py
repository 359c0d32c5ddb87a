"""What layers choose by that choose pages for themselves, of all pages of a pool whose tokens are known."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lim_kernels import bound_pages, gate_keys
from lim_kernels.block_gates import Gate, GatedBlocks, Rotation
from lim_kernels.page_bounds import PAGE, PageBounds
from sgl_lim.gates.rotation import gate_rotation
from sgl_lim.gates.weights import ModelShape, load_gates, with_rotation
from sgl_lim.methods import Method, Role, SeerAttention
from sgl_lim.serving.model_rotation import LayerRotation


class OwnPages(Protocol):
    """Of one model and method."""

    def of_layer(self, layer: int, keys: Tensor, positions: Tensor) -> PageBounds | GatedBlocks:
        """What a layer knows of the pages of keys [N, H_kv, D], whose tokens have `positions` int64 [N].

        A row's last page may hold later rows' tokens, but no row ranks its last page.
        """
        ...


class Bounds:
    """Bounds of all pages."""

    def of_layer(self, layer: int, keys: Tensor, positions: Tensor) -> PageBounds:
        """See `OwnPages`."""
        sides = (keys.new_empty(-(-len(keys) // PAGE), *keys.shape[1:]) for _ in range(2))
        bounds = PageBounds(*sides)
        bound_pages(bounds, keys, torch.arange(len(keys), device=keys.device))
        return bounds


class Gates:
    """Gate keys of all blocks."""

    def __init__(self, gates: list[Gate], rotation: Rotation, block: int) -> None:
        """Of the gates of all layers; `rotation` is the model's own."""
        self._gates, self._rotation, self._block = gates, rotation, block

    def of_layer(self, layer: int, keys: Tensor, positions: Tensor) -> GatedBlocks:
        """See `OwnPages`."""
        gate = self._gates[layer]
        made = torch.zeros(
            -(-len(keys) // self._block), len(gate.key), gate.width, dtype=gate.key.dtype, device=keys.device
        )
        blocks = GatedBlocks(gate, made, self._block, self._rotation)
        gate_keys(blocks, keys, torch.arange(len(keys), device=keys.device), positions)
        return blocks


def own_pages(
    method: Method, shape: ModelShape, turned: LayerRotation | None, dtype: torch.dtype, device: torch.device
) -> OwnPages | None:
    """What a model's layers choose by under a method; None where none chooses for itself.

    Args:
        turned: how the model rotates queries and keys; None where it cannot be told.

    Raises:
        GateError: the gates do not fit the model.
        ValueError: gates need the rotation, and it cannot be told.
    """
    if Role.OWN not in method.layer_roles(shape.layers):
        return None
    if not isinstance(method, SeerAttention):
        return Bounds()
    config = method.gate_config
    assert config is not None and method.gates is not None
    if turned is None:
        raise ValueError(f"--lim-method {method.name}: it cannot be told how this model rotates keys; take quest")
    rotation = gate_rotation(config, shape.head_dim, turned.rotation, turned.theta)
    gates = load_gates(method.gates, shape, dtype, device)
    return Gates([with_rotation(gate, rotation) for gate in gates], turned.rotation, config.block)


def positions_of(slots: Tensor, lens: Tensor, count: int) -> Tensor:
    """int64 [count]: the position of the token in each slot; 0 in slots of none of the rows.

    Args:
        slots: int32 [R, W]; lens: int32 [R].
    """
    places = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape)
    inside = places < lens.unsqueeze(1)
    positions = torch.zeros(count, dtype=torch.int64, device=slots.device)
    positions[slots[inside].long()] = places[inside]
    return positions


def rotation_of(model: Any) -> LayerRotation | None:
    """How a model of transformers rotates queries and keys; None where it has not one `rotary_emb` for all layers."""
    modules = [getattr(module, "rotary_emb", None) for module in model.modules()]
    rotary = next((module for module in modules if module is not None), None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        return None
    text = model.config.get_text_config()
    device = rotary.inv_freq.device
    positions = torch.arange(text.max_position_embeddings, device=device)[None]
    cos, sin = (part[0] for part in rotary(torch.zeros(1, device=device), positions))
    half = cos.shape[1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        table, interleaved = torch.cat((cos[:, :half], sin[:, :half]), dim=1), False
    elif torch.equal(cos[:, ::2], cos[:, 1::2]):
        table, interleaved = torch.cat((cos[:, ::2], sin[:, ::2]), dim=1), True
    else:
        return None
    plain = getattr(rotary, "rope_type", "default") == "default"
    return LayerRotation(Rotation(table.float().contiguous(), interleaved), _theta(text) if plain else None)


def _theta(text: Any) -> float | None:
    """Base of the frequencies; transformers 5 keeps it among others."""
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(text, "rope_theta", None))
    return None if theta is None else float(theta)
