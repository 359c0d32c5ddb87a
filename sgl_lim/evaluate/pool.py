"""Keys and values of many sequences in one pool, as a server keeps them: a token's slot is the same in every layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lim_kernels.page_bounds import PAGE


@dataclass
class Pool:
    """Grows as slots are taken; sequences that share leading tokens may share their slots."""

    used: int = 0
    """Slots that are taken, from 0 on."""
    room: int = 0
    """Slots that memory is taken for at once."""
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, count: int, device: torch.device, *, go_on: bool = False) -> Tensor:
        """int64 [count]: consecutive slots that nobody has, from the beginning of a page on.

        Args:
            go_on: from the last slot taken on instead.
        """
        first = self.used if go_on else -(-self.used // PAGE) * PAGE
        self.used = first + count
        return torch.arange(first, self.used, device=device)

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys [1, H_kv, S, D] and values [1, H_kv, S, D_v] of one layer into slots int64 [S]."""
        found = self._layers.get(layer)
        if found is None or len(found[0]) < self.used:
            found = self._layers[layer] = (self._grown(found and found[0], k), self._grown(found and found[1], v))
        for kept, new in zip(found, (k, v), strict=True):
            kept[slots] = new[0].transpose(0, 1)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [N, H_kv, D] and values [N, H_kv, D_v], contiguous."""
        return self._layers[layer]

    def _grown(self, kept: Tensor | None, like: Tensor) -> Tensor:
        """Room for all slots that are taken, with what is kept."""
        made = like.new_zeros(max(self.used, self.room), like.shape[1], like.shape[3])
        if kept is not None:
            made[: len(kept)] = kept
        return made
