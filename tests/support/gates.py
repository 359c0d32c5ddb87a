"""Random gates for the methods that need some, so that tests of every method can name them."""

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.random_gates import drawn
from sgl_lim.gates import GateConfig, save_gates
from sgl_lim.gates.weights import ModelShape
from support.gate_oracle import GateRule, PublishedGate

BLOCK, WIDTH = 16, 64
NEED_GATES = ("seerattention",)


@lru_cache
def gates_for(layers: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> str:
    """The path of random gates of a model's shape; the same within a process, and gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="gates-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_gates(folder, ModelShape(layers, heads, kv_heads, dim), seed)
    return str(folder)


def write_gates(folder: Path, shape: ModelShape, seed: int = 0) -> GateConfig:
    """Write gates that say nothing of a base model but by their shape."""
    config = GateConfig(BLOCK, WIDTH, ("max", "min", "avg"), "Qproj", True, True, 0, None, {})
    save_gates(folder, config, drawn(config, shape, seed))
    return config


def with_gates(name: str, *shape: int) -> dict[str, str]:
    """The parameters that a method needs beside a budget, for a model of (layers, heads, KV heads, head size)."""
    return {"gates": gates_for(*shape)} if name in NEED_GATES else {}


def spec_with_gates(name: str, *shape: int) -> str:
    """The same as a spec of `method_of`."""
    return ":".join([name, *(f"{key}={value}" for key, value in with_gates(name, *shape).items())])


@lru_cache
def published(layers: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> list[PublishedGate]:
    """The gates that `write_gates` writes, for the oracle: drawn again and rounded as they are stored."""
    config = GateConfig(BLOCK, WIDTH, ("max", "min", "avg"), "Qproj", True, True, 0, None, {})
    rule = GateRule(heads, kv_heads, dim, WIDTH, BLOCK)
    stored = [
        {name: weight.to(torch.bfloat16) for name, weight in parts.items()}
        for parts in drawn(config, ModelShape(layers, heads, kv_heads, dim), seed)
    ]
    return [
        PublishedGate(rule, parts["linear_q"], parts["linear_k"], parts["qnorm"], parts["knorm"]) for parts in stored
    ]
