"""The chain tracer's sizes."""

from dataclasses import dataclass

import torch
from small_qwen3 import model
from small_qwen3.model import LayerWeights, finish, load_checkpoint, project, rms_norm, rope_table, save_checkpoint

__all__ = [
    "ChainTracer",
    "LayerWeights",
    "Shape",
    "finish",
    "load_checkpoint",
    "project",
    "rms_norm",
    "rope_table",
    "save_checkpoint",
]


@dataclass(frozen=True)
class Shape(model.Shape):
    """Sizes of the model; the defaults are the published checkpoint's."""

    layers: int = 12
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 416
    vocab: int = 512


class ChainTracer(model.SmallQwen3):
    """A small Qwen3 of these sizes."""

    def __init__(self, shape: model.Shape | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(shape or Shape(), dtype)
