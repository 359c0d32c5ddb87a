"""Weights of gates: read from a folder and put into the operators' form, or written as the authors publish them."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lim_kernels.block_gates import Gate, Rotation
from sgl_lim.gates.config import GateConfig, GateError
from sgl_lim.gates.folder import CONFIG, PICKLED, find, read_config, weights_file

_NAME = "model.layers.{layer}.self_attn.attn_gate.attngate_{part}.weight"
LINEAR_Q, LINEAR_K, QNORM, KNORM = "linear_q", "linear_k", "qnorm", "knorm"


@dataclass(frozen=True)
class ModelShape:
    """What gates have to fit."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


def load_gates(path: str, shape: ModelShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Gate]:
    """The gates of all layers, for all KV heads and without a rotation; see `of_heads` and `with_rotation`.

    Raises:
        GateError: there are no such gates, or they do not fit a model of this shape.
    """
    config, weights = read_config(path), _read(find(path))
    problems = shape_problems(config, weights, shape)
    if problems:
        raise GateError(f"{path}: {'; '.join(problems)}")
    gates = []
    for layer in range(shape.layers):
        own = {part: weights.get(_NAME.format(layer=layer, part=part)) for part in (LINEAR_Q, LINEAR_K, QNORM, KNORM)}
        keys = own[LINEAR_K]
        assert keys is not None
        parts = [_query_weights(config, own[LINEAR_Q], shape), keys, *(own[name] for name in (QNORM, KNORM))]
        on_device = [None if w is None else w.to(device=device, dtype=dtype).contiguous() for w in parts]
        assert on_device[0] is not None and on_device[1] is not None
        gates.append(Gate(on_device[0], on_device[1], on_device[2], on_device[3], config.pools, None))
    return gates


def of_heads(gate: Gate, first: int, count: int) -> Gate:
    """The gate of some KV heads alone, as a rank has them."""
    part = slice(first, first + count)
    return replace(gate, query=gate.query[part].contiguous(), key=gate.key[part].contiguous())


def with_rotation(gate: Gate, rotation: Rotation | None) -> Gate:
    """The gate, whose queries and keys are rotated."""
    return replace(gate, rotation=rotation)


def save_gates(folder: Path, config: GateConfig, gates: Sequence[Mapping[str, Tensor]]) -> None:
    """Write gates as the authors publish them, in bfloat16.

    Args:
        gates: of each layer the weights by their published names: `linear_q` [H_kv, G, D, d] (or none for Qavg),
            `linear_k` [H_kv, pools * D, d], and `qnorm` and `knorm` [d] where there are norms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        _NAME.format(layer=layer, part=part): weight.detach().to("cpu", torch.bfloat16).contiguous()
        for layer, parts in enumerate(gates)
        for part, weight in parts.items()
    }
    torch.save(state, folder / PICKLED)
    (folder / CONFIG).write_text(json.dumps(config.values(), indent=2, sort_keys=True) + "\n")


def shape_problems(config: GateConfig, weights: Mapping[str, Tensor], shape: ModelShape) -> list[str]:
    """Why gates do not fit a model; each reason with what was expected."""
    expected = expected_shapes(config, shape)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    missing = sorted(set(expected) - set(found))
    if missing:
        return [
            f"it has no {missing[0]} ({len(missing)} of {len(expected)} tensors are missing); these are other gates"
        ]
    deeper = [name for name in found if name not in expected]
    if deeper:
        return [f"it has {deeper[0]}, which a model of {shape.layers} layers has no use for; take this model's gates"]
    wrong = [name for name in expected if found[name] != expected[name]]
    return [
        f"{name} is {list(found[name])}, and the model's {shape.heads} query heads and {shape.kv_heads} KV heads of "
        f"{shape.head_dim} need {list(expected[name])}; take this model's gates"
        for name in wrong[:1]
    ]


def expected_shapes(config: GateConfig, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's gates by name."""
    queries: dict[str, tuple[int, ...]] = {
        "Qproj": (shape.kv_heads, shape.group, shape.head_dim, config.width),
        "Qavgproj": (shape.kv_heads, shape.head_dim, config.width),
    }
    parts: dict[str, tuple[int, ...]] = {LINEAR_K: (shape.kv_heads, len(config.pools) * shape.head_dim, config.width)}
    if config.query in queries:
        parts[LINEAR_Q] = queries[config.query]
    if config.norm:
        parts |= {QNORM: (config.width,), KNORM: (config.width,)}
    return {_NAME.format(layer=layer, part=part): size for layer in range(shape.layers) for part, size in parts.items()}


def read_shapes(path: str) -> Mapping[str, Tensor]:
    """The tensors of a folder of gates, whose content is read when it is used. Raises GateError."""
    return _read(find(path))


def _query_weights(config: GateConfig, linear: Tensor | None, shape: ModelShape) -> Tensor:
    """[H_kv, G * D, d]: every way to pool query heads as a projection of each."""
    if config.query == "Qproj":
        assert linear is not None
        return linear.flatten(1, 2)
    if linear is None:
        linear = torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1)
    return (linear / shape.group).repeat(1, shape.group, 1)


def _read(folder: Path) -> Mapping[str, Tensor]:
    file = weights_file(folder)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GateError(f"{file}: cannot be read as tensors ({reason}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GateError(f"{file}: expected a dictionary of tensors; download it again")
    return state
