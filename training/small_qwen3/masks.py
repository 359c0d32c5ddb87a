"""Attention under masks: flex attention on CUDA, a dense mask elsewhere."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

BLOCK = 128
# flex_attention's default forward tile for bf16 and head dim 64 on sm_90 (128 x 128, 4 warps) spills 1.5 kB a thread
# under a mask function: 12.8 ms a layer, 13 times its backward. ptxas reports no spills for this one.
_TILE = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
FORWARD_TILE = cast(FlexKernelOptions, _TILE)
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_mask(rule: Rule, length: int, device: torch.device) -> BlockMask | Tensor:
    """The mask of a rule over rows of `length` tokens: a BlockMask on CUDA, bool [length, length] elsewhere."""
    row = torch.arange(length, device=device)
    visible = rule(row, row, row[:, None], row[None, :])
    return block_mask(visible, rule) if device.type == "cuda" else visible


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
