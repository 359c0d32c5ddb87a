"""Specification of block gates in plain torch (SeerAttention-R, arXiv 2506.08889, section 3).

    query(b, h) = rotate(norm(sum over the query heads g of KV head h of W_q[h, g] q[b, g]), position of b)
    key(j, h)   = rotate(norm(W_k[h] (pools of the keys of block j joined)), first position of block j)
    score       = query · key / sqrt(d)

q and the keys are those before the model's own rotation. Training differentiates these functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lim_kernels.attention import gather_slots, group_queries
from lim_kernels.block_gates.state import EPSILON, Gate, GatedBlocks, Rotation


def gate_keys(blocks: GatedBlocks, k_cache: Tensor, written: Tensor, positions: Tensor, *, k_scale: float) -> None:
    """See `api.gate_keys`."""
    size = blocks.block
    last = written % size == size - 1
    full, first = written[last].long() // size, positions[last].long() - (size - 1)
    if not len(full):
        return
    places = torch.arange(size, device=written.device)
    # [N, H_kv, n, D]
    keys = gather_slots(k_cache, full.unsqueeze(1) * size + places).to(_compute(k_cache)) * k_scale
    bare = unrotate(keys, blocks.rotation, (first.unsqueeze(1) + places).unsqueeze(1))
    blocks.keys[full] = project_keys(blocks.gate, pool_keys(bare, blocks.gate.pools), first).to(blocks.keys.dtype)


def score_blocks(q: Tensor, blocks: GatedBlocks, slots: Tensor, seq_lens: Tensor, *, score_beyond: int) -> Tensor:
    """See `api.score_blocks`; float64 operands are scored in float64."""
    current = seq_lens.long() - 1
    bare = unrotate(q.to(_compute(q)), blocks.rotation, current.unsqueeze(1))
    queries = project_queries(blocks.gate, bare, current)
    firsts = slots[:, :: blocks.block]
    inside = torch.arange(firsts.shape[1], device=slots.device) * blocks.block < seq_lens.unsqueeze(1)
    # [B, P, H_kv, d]
    keys = blocks.keys[firsts.where(inside, 0).long() // blocks.block].to(queries.dtype)
    return (torch.einsum("bhd,bphd->bhp", queries, keys) * blocks.gate.width**-0.5).float()


def pool_keys(keys: Tensor, pools: tuple[str, ...]) -> Tensor:
    """Keys [..., n, D] of blocks, pooled and joined: [..., len(pools) * D]."""
    by_name: dict[str, Callable[[Tensor], Tensor]] = {
        "max": lambda of: of.amax(-2),
        "min": lambda of: of.amin(-2),
        "avg": lambda of: of.mean(-2),
    }
    return torch.cat([by_name[name](keys) for name in pools], dim=-1)


def project_keys(gate: Gate, pooled: Tensor, first: Tensor) -> Tensor:
    """The gate's keys [N, H_kv, d] of pooled keys [N, H_kv, len(pools) * D] of blocks that begin at `first` [N]."""
    keys = torch.einsum("nhi,hio->nho", pooled, gate.key.to(pooled.dtype))
    return _finish(keys, gate.key_norm, gate.rotation, first)


def project_queries(gate: Gate, q: Tensor, positions: Tensor) -> Tensor:
    """The gate's queries [B, H_kv, d] of queries [B, H, D] before their rotation, at `positions` [B]."""
    joined = group_queries(q, len(gate.query)).flatten(2)
    queries = torch.einsum("bhi,hio->bho", joined, gate.query.to(q.dtype))
    return _finish(queries, gate.query_norm, gate.rotation, positions)


def rotate(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """Vectors x [..., D], rotated as of integer positions, which broadcast to x.shape[:-1]."""
    cos, sin = _angles(rotation, positions, x.dtype)
    one, two, rest = _parts(x, rotation)
    return _joined(one * cos - two * sin, two * cos + one * sin, rest, rotation)


def unrotate(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """The vectors that `rotate` made x of."""
    cos, sin = _angles(rotation, positions, x.dtype)
    one, two, rest = _parts(x, rotation)
    scale = cos * cos + sin * sin
    return _joined((one * cos + two * sin) / scale, (two * cos - one * sin) / scale, rest, rotation)


def _finish(x: Tensor, norm: Tensor | None, rotation: Rotation | None, positions: Tensor) -> Tensor:
    """Norm and rotation of the gate's vectors [N, H_kv, d]."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * norm.to(x.dtype)
    return x if rotation is None else rotate(x, rotation, positions.unsqueeze(1))


def _angles(rotation: Rotation, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rotation.table[positions.long()].to(dtype).chunk(2, dim=-1)
    return cos, sin


def _parts(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """The elements that are rotated together, and those that are not rotated."""
    turned, rest = x.tensor_split([rotation.table.shape[1]], dim=-1)
    if rotation.interleaved:
        return turned[..., ::2], turned[..., 1::2], rest
    one, two = turned.chunk(2, dim=-1)
    return one, two, rest


def _joined(one: Tensor, two: Tensor, rest: Tensor, rotation: Rotation) -> Tensor:
    turned = torch.stack((one, two), dim=-1).flatten(-2) if rotation.interleaved else torch.cat((one, two), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def _compute(operand: Tensor) -> torch.dtype:
    return torch.float64 if operand.dtype == torch.float64 else torch.float32
