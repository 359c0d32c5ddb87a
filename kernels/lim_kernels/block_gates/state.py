"""What a layer's gate is made of, and what is known of a KV pool's blocks by it."""

from dataclasses import dataclass

from torch import Tensor

POOLS = ("max", "min", "avg")
"""Ways to make one key of a block's, element by element."""
EPSILON = 1e-6
"""Of the gate's norms."""


@dataclass(frozen=True)
class Rotation:
    """How positions rotate queries and keys (RoPE)."""

    table: Tensor
    """float32 [positions, R], R even: cosines of R / 2 frequencies, then their sines. What lies behind the first R
    elements of a vector is not rotated. Whatever a table scales vectors by besides, taking it back divides by."""
    interleaved: bool = False
    """Whether element 2 i is rotated with 2 i + 1, rather than i with i + R / 2."""


@dataclass(frozen=True)
class Gate:
    """The weights of one layer's gate, for the KV heads of a rank."""

    query: Tensor  # floating [H_kv, G * D, d]: of each KV head, from its G query heads to one query of the gate
    key: Tensor  # floating [H_kv, len(pools) * D, d]: from a block's pooled keys to one key of the gate
    query_norm: Tensor | None  # floating [d], weights of an RMSNorm; None: there is none
    key_norm: Tensor | None
    pools: tuple[str, ...]  # of POOLS, in the order in which pooled keys are joined
    rotation: Rotation | None  # of the gate's queries and keys, R = d; None: they are not rotated

    @property
    def width(self) -> int:
        """d, a power of two."""
        return self.query.shape[2]


@dataclass(frozen=True)
class GatedBlocks:
    """The gate's keys of a KV pool's blocks in one layer."""

    gate: Gate
    keys: Tensor  # floating [blocks, H_kv, d]; block b is KV slots n b … n b + n - 1, n = block
    block: int  # tokens a block, a power of two
    rotation: Rotation  # of the model's own queries and keys, which is taken back before the gate sees them
