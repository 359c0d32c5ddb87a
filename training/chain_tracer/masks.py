"""Attention masks of training rows: alternative chains over one context, and layers closed to the context.

In a *closed* layer a solution row sees the first `SINKS` tokens, a window of recent ones and perhaps a few random
others; contexts and headers, which a server prefills densely, always see everything before them.
"""

import torch
from small_qwen3.masks import Rule, build_mask
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .data import Layout

SINKS = 4


class TrainingMasks:
    """Masks of the current layout, `open` and `closed`: BlockMask on CUDA, bool [length, length] elsewhere.

    The coordinates live in buffers that `set` overwrites, so that compiled layers see the same mask functions
    throughout and never recompile.
    """

    position: Tensor  # int32 [length], the current layout's positions
    open: BlockMask | Tensor
    closed: BlockMask | Tensor

    def __init__(self, length: int, device: torch.device | str) -> None:
        self.length, self.device = length, torch.device(device)
        self._document, self._chain, self.position, self._solution = (
            torch.zeros(length, dtype=torch.int32, device=device) for _ in range(4)
        )
        self._anchor = torch.zeros(length, dtype=torch.bool, device=device)
        self._closed_from = torch.zeros(length, dtype=torch.int32, device=device)
        self._open_rule = self._rule(torch.full((length,), -1, dtype=torch.int32, device=device))
        self._closed_rule = self._rule(self._closed_from)

    def set(self, layout: Layout, *, window: int, keep: float = 0.0) -> None:
        """Take a layout; closed rows see `window` recent tokens and each earlier token with probability `keep`."""
        coordinates = layout.coordinates.to(self.device, torch.int32)
        for buffer, row in zip((self._document, self._chain, self.position, self._solution), coordinates, strict=True):
            buffer.copy_(row)
        self._anchor.copy_((self.position < SINKS) | (torch.rand(self.length, device=self.device) < keep))
        self._closed_from.copy_(torch.where(self._solution > 0, self.position - window, -1))
        rules = self._open_rule, self._closed_rule
        self.open, self.closed = (build_mask(rule, self.length, self.device) for rule in rules)

    def _rule(self, visible_after: Tensor) -> Rule:
        document, chain, position, anchor = self._document, self._chain, self.position, self._anchor

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (document[q] == document[k]) & (position[k] <= position[q])
            own = (chain[k] == 0) | (chain[k] == chain[q])
            return same & own & ((position[k] > visible_after[q]) | anchor[k])

        return visible
