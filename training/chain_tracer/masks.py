"""Attention masks of training rows: alternative chains over one context, and layers closed to the context.

In a *closed* layer a solution row sees the first `SINKS` tokens, a window of recent ones and perhaps a few random
others; contexts and headers, which a server prefills densely, always see everything before them.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from .data import Layout

SINKS = 4
BLOCK = 128
# flex_attention's default forward tile for bf16 and head dim 64 on sm_90 (128 x 128, 4 warps) spills 1.5 kB a thread
# under a mask function: 12.8 ms a layer, 13 times its backward. ptxas reports no spills for this one.
_TILE = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
FORWARD_TILE = cast(FlexKernelOptions, _TILE)
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
        self.open, self.closed = self._build(self._open_rule), self._build(self._closed_rule)

    def _rule(self, visible_after: Tensor) -> Rule:
        document, chain, position, anchor = self._document, self._chain, self.position, self._anchor

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (document[q] == document[k]) & (position[k] <= position[q])
            own = (chain[k] == 0) | (chain[k] == chain[q])
            return same & own & ((position[k] > visible_after[q]) | anchor[k])

        return visible

    def _build(self, rule: Rule) -> BlockMask | Tensor:
        row = torch.arange(self.length, device=self.device)
        visible = rule(row, row, row[:, None], row[None, :])
        return block_mask(visible, rule) if self.device.type == "cuda" else visible


def block_mask(visible: Tensor, rule: Rule) -> BlockMask:
    """The BlockMask of a rule from what it allows, bool [length, length]; `create_block_mask` costs the host 30 ms."""
    blocks = visible.shape[0] // BLOCK
    allowed = visible.view(blocks, BLOCK, blocks, BLOCK).sum(dim=(1, 3))
    full = allowed == BLOCK * BLOCK
    operands = []
    for chosen in ((allowed > 0) & ~full, full):
        order = chosen.int().argsort(dim=1, descending=True, stable=True)
        operands += [chosen.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]]
    lengths = (visible.shape[0], visible.shape[1])
    partial_count, partial, full_count, whole = operands
    return BlockMask.from_kv_blocks(
        partial_count, partial, full_count, whole, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=lengths
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor) -> Tensor:
    """Grouped-query attention [B, heads, L, D] under a training mask; softmax scale D^-0.5."""
    if isinstance(mask, BlockMask):
        return cast(Tensor, flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=FORWARD_TILE))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
