"""The recipe of SeerAttention-R (arXiv 2506.08889): gates learn where the model's own attention is largest.

The truth of a query and a KV head is, for each block before the query's own, the largest weight that any of the head's
query heads gives to any of its keys, normalised over these blocks. The loss is the divergence of the gate's softmax
from that, for the second half of each sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels.block_gates import Gate, Rotation
from lim_kernels.block_gates.reference import pool_keys, project_keys, project_queries, unrotate

LOGIT_BYTES = 1 << 30
"""Most memory that one chunk of queries' logits takes."""


@dataclass(frozen=True)
class Attended:
    """What a layer attended with in whole sequences that begin at position 0."""

    q: Tensor  # [B, H, T, D], rotated
    k: Tensor  # [B, H_kv, T, D], rotated
    scale: float
    """Of logits."""
    rotation: Rotation
    """Of q and k."""


def gate_loss(gate: Gate, layer: Attended, *, block: int, logit_bytes: int = LOGIT_BYTES) -> Tensor:
    """Divergence of a layer's gate from its attention: nats, mean over queries and KV heads.

    Args:
        logit_bytes: queries are taken so many at once that their float32 logits take no more.
    """
    q, k = layer.q, layer.k
    keys = block_keys(gate, k, block, layer.rotation)
    losses = []
    for first, last in chunks(q.shape, logit_bytes):
        truth = block_truth(q[:, :, first:last], k, first, scale=layer.scale, block=block)
        scores = block_scores(gate, q[:, :, first:last], keys, first, layer.rotation)
        before = blocks_before(first, last, keys.shape[2], block, q.device)
        shares = scores.masked_fill(~before, float("-inf")).log_softmax(-1)
        # What is no block before the query has neither truth nor share.
        divergence = torch.xlogy(truth, truth) - truth * shares.masked_fill(~before, 0.0)
        losses.append(divergence.sum())
    queries = q.shape[0] * k.shape[1] * (q.shape[2] - q.shape[2] // 2)
    return torch.stack(losses).sum() / queries


def chunks(shape: torch.Size, logit_bytes: int) -> Iterator[tuple[int, int]]:
    """The queries of a sequence's second half, by first and last, some at once."""
    batch, heads, length, _ = shape
    step = max(1, logit_bytes // (4 * batch * heads * length))
    for first in range(length // 2, length, step):
        yield first, min(first + step, length)


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
    return queries @ keys.transpose(2, 3) * gate.width**-0.5


@torch.no_grad()
def block_truth(q: Tensor, k: Tensor, first: int, *, scale: float, block: int) -> Tensor:
    """What the attention of queries [B, H, C, D] says of complete blocks: float32 [B, H_kv, C, blocks], sums of 1."""
    _, heads, count, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    # [B, H_kv, G * C, T]
    grouped = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = (grouped @ k.transpose(2, 3)).float().mul_(scale).unflatten(2, (heads // kv_heads, count))
    places = torch.arange(length, device=q.device)
    later = places > torch.arange(first, first + count, device=q.device).unsqueeze(1)
    logits.masked_fill_(later, float("-inf"))
    lse = logits.logsumexp(-1)
    blocks = length // block
    largest = logits[..., : blocks * block].unflatten(-1, (blocks, block)).amax(-1)
    weights = (largest - lse.unsqueeze(-1)).exp().amax(2)
    weights = weights * blocks_before(first, first + count, blocks, block, q.device)
    return F.normalize(weights, p=1, dim=-1, eps=1e-9)


def blocks_before(first: int, last: int, blocks: int, block: int, device: torch.device) -> Tensor:
    """bool [last - first, blocks]: those that are complete before each query's own block."""
    queries = torch.arange(first, last, device=device).unsqueeze(1)
    return torch.arange(blocks, device=device) < queries // block
