"""Random gates of a model's size, in the form in which SeerAttention's authors publish theirs.

    python -m benchmarks.random_gates benchmarks/shapes/qwen3-8b .gates/qwen3-8b

What they cost is what trained ones cost, and what they choose is chance.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_lim import command
from sgl_lim.gates import GateConfig, save_gates
from sgl_lim.gates.config import BLOCKS, WIDTHS
from sgl_lim.gates.weights import KNORM, LINEAR_K, LINEAR_Q, QNORM, ModelShape


def write(
    model: Path, folder: Path, *, block: int = 64, width: int | None = None, seed: int = 0, **config: Any
) -> GateConfig:
    """Write gates for the model of a `config.json`.

    Args:
        width: of the gates; None: that of the model's heads.
        config: other fields of `GateConfig`.
    """
    values = json.loads((model / "config.json").read_text())
    shape = shape_of(values)
    named: dict[str, Any] = {
        "pools": ("max", "min", "avg"),
        "query": "Qproj",
        "norm": True,
        "rotate": True,
        "start_layer": 0,
        "base_model": model.name,
        "model": {name: values[name] for name in ("model_type", "hidden_size", "vocab_size") if name in values},
    }
    made = GateConfig(block=block, width=width or shape.head_dim, **{**named, **config})
    save_gates(folder, made, drawn(made, shape, seed))
    return made


def shape_of(values: dict[str, Any]) -> ModelShape:
    """Of the content of a Hugging Face `config.json`."""
    heads = values["num_attention_heads"]
    return ModelShape(
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
    )


def drawn(config: GateConfig, shape: ModelShape, seed: int) -> list[dict[str, Tensor]]:
    """Weights by layer and published name, of the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, fan: int) -> Tensor:
        return torch.randn(*size, generator=generator) * fan**-0.5

    layers = []
    for _ in range(shape.layers):
        inputs = len(config.pools) * shape.head_dim
        parts = {LINEAR_K: normal(shape.kv_heads, inputs, config.width, fan=inputs)}
        if config.query == "Qproj":
            fan = shape.group * shape.head_dim
            parts[LINEAR_Q] = normal(shape.kv_heads, shape.group, shape.head_dim, config.width, fan=fan)
        elif config.query == "Qavgproj":
            parts[LINEAR_Q] = normal(shape.kv_heads, shape.head_dim, config.width, fan=shape.head_dim)
        if config.norm:
            parts |= {name: 1 + 0.3 * normal(config.width, fan=1) for name in (QNORM, KNORM)}
        layers.append(parts)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with the model's config.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--block", type=int, choices=BLOCKS, default=64)
    parser.add_argument("--width", type=int, choices=WIDTHS, help="default: that of the model's heads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.model, args.folder, block=args.block, width=args.width, seed=args.seed)


if __name__ == "__main__":
    command.run(main)
