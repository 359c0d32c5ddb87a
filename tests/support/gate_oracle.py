"""SeerAttention-R's gate in float64, element by element, written from its paper (arXiv 2506.08889) and the shapes of
the published weights, before any rotation is taken back: queries and keys are those of before the model's RoPE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.block_gates import Gate, Rotation

THETA = 10_000.0
ROUNDING = 1e-3
"""Of scores in float32, whose angles are products of large positions."""


@dataclass(frozen=True)
class GateRule:
    """Sizes of a model and of its gates, and what the gates do."""

    heads: int
    kv_heads: int
    dim: int
    width: int
    block: int
    pools: tuple[str, ...] = ("max", "min", "avg")
    norm: bool = True
    rotate: bool = True
    turned: int | None = None
    """Elements of a vector that the model rotates; None: all."""
    interleaved: bool = False
    mscale: float = 1.0

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def turned_dims(self) -> int:
        return self.dim if self.turned is None else self.turned


@dataclass(frozen=True)
class PublishedGate:
    """One layer's weights as the authors publish them."""

    rule: GateRule
    linear_q: Tensor  # [H_kv, G, D, d]
    linear_k: Tensor  # [H_kv, len(pools) * D, d]
    qnorm: Tensor | None  # [d]
    knorm: Tensor | None  # [d]

    def as_operand(self, device: str = "cpu", positions: int = 256) -> Gate:
        """As the operators take it."""
        rule = self.rule
        table = angles(rule.width, positions, rule.mscale) if rule.rotate else None
        on_device = [None if w is None else w.to(device) for w in (self.qnorm, self.knorm)]
        return Gate(
            query=self.linear_q.flatten(1, 2).contiguous().to(device),
            key=self.linear_k.to(device),
            query_norm=on_device[0],
            key_norm=on_device[1],
            pools=rule.pools,
            rotation=None if table is None else Rotation(table.to(device)),
        )


def draw_gate(rule: GateRule, generator: torch.Generator, dtype: torch.dtype) -> PublishedGate:
    """Random weights of the size that trained ones have."""

    def drawn(*shape: int, fan: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * fan**-0.5).to(dtype)

    norms = [(1 + 0.3 * torch.randn(rule.width, generator=generator)).to(dtype) if rule.norm else None for _ in "qk"]
    inputs = len(rule.pools) * rule.dim
    return PublishedGate(
        rule,
        drawn(rule.kv_heads, rule.group, rule.dim, rule.width, fan=rule.group * rule.dim),
        drawn(rule.kv_heads, inputs, rule.width, fan=inputs),
        *norms,
    )


def angles(turned: int, positions: int, mscale: float) -> Tensor:
    """The operators' table, float32 [positions, turned]: cosines, then sines."""
    frequency = THETA ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    turn = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return (mscale * torch.cat((turn.cos(), turn.sin()), dim=1)).float()


def rope(x: Tensor, rule: GateRule, positions: Tensor, *, back: bool = False) -> Tensor:
    """float64 [N, heads, D] rotated as of positions [N], by complex numbers; `back` undoes it."""
    turned = rule.turned_dims
    head, rest = x[..., :turned], x[..., turned:]
    pairs = head.unflatten(-1, (-1, 2)) if rule.interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    frequency = THETA ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    turn = torch.polar(torch.full_like(frequency, rule.mscale), positions.double()[:, None, None] * frequency)
    numbers = torch.view_as_complex(pairs.contiguous())
    done = torch.view_as_real(numbers / turn if back else numbers * turn)
    joined = done.flatten(-2) if rule.interleaved else done.transpose(-1, -2).flatten(-2)
    return torch.cat((joined, rest), dim=-1)


def finish(x: Tensor, norm: Tensor | None, rule: GateRule, position: int) -> Tensor:
    """Norm and rotation of the gate's vectors [H_kv, d] at one position."""
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    if not rule.rotate:
        return x
    whole = GateRule(rule.heads, rule.kv_heads, rule.width, rule.width, rule.block, mscale=rule.mscale)
    return rope(x[None], whole, torch.tensor([position]))[0]


def gate_key(gate: PublishedGate, keys: Tensor, first: int) -> Tensor:
    """float64 [H_kv, d] of a block's keys [block, H_kv, D] before their rotation; the block begins at `first`."""
    pooled = {"max": keys.amax(0), "min": keys.amin(0), "avg": keys.sum(0) / len(keys)}
    joined = torch.cat([pooled[name] for name in gate.rule.pools], dim=1)
    projected = torch.stack([joined[h] @ gate.linear_k[h].double() for h in range(gate.rule.kv_heads)])
    return finish(projected, gate.knorm, gate.rule, first)


def gate_scores(gate: PublishedGate, q: Tensor, keys: Tensor, position: int) -> Tensor:
    """float64 [H_kv, P] of queries [H, D] before their rotation at a position, by gate keys [P, H_kv, d]."""
    rule, queries = gate.rule, []
    for head in range(rule.kv_heads):
        members = q.double()[head * rule.group : (head + 1) * rule.group]
        queries.append(sum(one @ weight for one, weight in zip(members, gate.linear_q[head].double(), strict=True)))
    finished = finish(torch.stack(queries), gate.qnorm, rule, position)
    return torch.stack([keys[:, h] @ finished[h] for h in range(rule.kv_heads)]) / math.sqrt(rule.width)


def chosen_blocks(scores: Tensor, before: int, most: int, threshold: float | None) -> list[int]:
    """Blocks of one KV head, by scores float64 [P] of the `before` blocks that precede the current token's."""
    if before + 1 <= most:
        return list(range(before + 1))
    ranked = sorted(range(before), key=lambda block: (-float(scores[block]), block))[: most - 1]
    if threshold is not None:
        shares = scores[:before].softmax(0)
        ranked = [block for block in ranked if shares[block] > threshold]
    return sorted([*ranked, before])


def explains_blocks(
    gate: PublishedGate,
    served: Sequence[int],
    head: int,
    q: Tensor,
    keys: Tensor,
    budget: int,
    rounding: float = ROUNDING,
) -> bool:
    """Whether the positions `served` are those of the current token's block and the best-scored blocks before it.

    Scores may be off by rounding: no block left out may score surely higher than one that was kept.

    Args:
        q: [H, D], of the last position; keys: [L, H_kv, D]; both rotated, as a server has them.
        rounding: of scores, as a share of the largest.
    """
    rule, length = gate.rule, len(keys)
    if length <= budget:
        return list(served) == list(range(length))
    before = (length - 1) // rule.block
    kept = sorted({position // rule.block for position in served})
    whole = [t for block in kept for t in range(block * rule.block, min(length, (block + 1) * rule.block))]
    if list(served) != whole or len(kept) != budget // rule.block or kept[-1] != before:
        return False
    bare = rope(keys.double(), rule, torch.arange(length), back=True)
    q_bare = rope(q.double()[None], rule, torch.tensor([length - 1]), back=True)[0]
    blocks = [gate_key(gate, bare[n * rule.block : (n + 1) * rule.block], n * rule.block) for n in range(before)]
    scores = gate_scores(gate, q_bare, torch.stack(blocks), length - 1)[head]
    slack = rounding * float(scores.abs().max())
    left = sorted(set(range(before)) - set(kept))
    worst = min((float(scores[block]) for block in kept[:-1]), default=math.inf)
    return worst + slack >= max(float(scores[block]) for block in left)
