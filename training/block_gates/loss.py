"""The recipe of SeerAttention-R (arXiv 2506.08889): gates learn where the model's own attention is largest.

The truth of a query and a KV head is, for each block before the query's own, the largest weight that any of the head's
query heads gives to any of its keys, normalised over these blocks. The loss is the divergence of the gate's softmax
from that, for the second half of each sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.block_gates import Gate, Rotation
from lim_kernels.block_gates.reference import pool_keys, project_keys, project_queries, unrotate

from .truth import block_truth, blocks_before

_LEAST = -1e30
"""A score that has no share: not infinite, for no share times an infinite logarithm is no number."""


@dataclass(frozen=True)
class Attended:
    """What a layer attended with in whole sequences that begin at position 0."""

    q: Tensor  # [B, H, T, D], rotated
    k: Tensor  # [B, H_kv, T, D], rotated
    scale: float
    """Of logits."""
    rotation: Rotation
    """Of q and k."""


def gate_loss(gate: Gate, layer: Attended, *, block: int) -> Tensor:
    """Divergence of a layer's gate from its attention: nats, mean over queries and KV heads."""
    length = layer.k.shape[2]
    first, blocks = length // 2, length // block
    q = layer.q[:, :, first:]
    truth = block_truth(q, layer.k, first, scale=layer.scale, block=block)
    keys = block_keys(gate, layer.k, block, layer.rotation)
    scores = block_scores(gate, q, keys, first, layer.rotation)
    before = blocks_before(first, length, blocks, block, q.device)
    shares = scores.masked_fill(~before, _LEAST).log_softmax(-1)
    # What is no block before the query has no truth.
    divergence = torch.xlogy(truth, truth).sum() - (truth * shares).sum()
    return divergence / truth.shape[:3].numel()


def block_keys(gate: Gate, k: Tensor, block: int, rotation: Rotation) -> Tensor:
    """The gate's keys [B, H_kv, blocks, d] of the complete blocks of k [B, H_kv, T, D]."""
    batch, _, length, _ = k.shape
    count = length // block
    positions = torch.arange(count * block, device=k.device)
    bare = unrotate(k[:, :, : count * block].float(), rotation, positions)
    pooled = pool_keys(bare.unflatten(2, (count, block)), gate.pools)
    first = torch.arange(0, count * block, block, device=k.device).repeat(batch)
    made = project_keys(gate, pooled.transpose(1, 2).flatten(0, 1), first)
    return made.unflatten(0, (batch, count)).transpose(1, 2)


def block_scores(gate: Gate, q: Tensor, keys: Tensor, first: int, rotation: Rotation) -> Tensor:
    """The gate's scores [B, H_kv, C, blocks] of queries [B, H, C, D] at positions from `first` on."""
    batch, _, count, _ = q.shape
    positions = torch.arange(first, first + count, device=q.device)
    bare = unrotate(q.float(), rotation, positions).transpose(1, 2).flatten(0, 1)
    queries = project_queries(gate, bare, positions.repeat(batch)).unflatten(0, (batch, count)).transpose(1, 2)
    return (queries * gate.width**-0.5) @ keys.transpose(2, 3)
