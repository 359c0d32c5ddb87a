"""Public entry of block gates: validates operands and dispatches.

Who writes keys calls `gate_keys`. A decode step calls `score_blocks`, and has its sets by `choose_pages` and
`expand_pages`. None of them waits for the device.
"""

import torch
from torch import Tensor

from lim_kernels.block_gates import reference
from lim_kernels.block_gates.state import POOLS, GatedBlocks
from lim_kernels.dispatch import implementation_of, require, require_one_device, require_rows


def gate_keys(
    blocks: GatedBlocks,
    k_cache: Tensor,
    written: Tensor,
    positions: Tensor,
    *,
    k_scale: float = 1.0,
    implementation: str | None = None,
) -> None:
    """Make the gate's keys of the blocks that were just completed.

    A block is complete once its last slot is written. Its keys are taken from the cache, their rotation is taken back,
    they are pooled, projected and normalised, and the result is rotated as of the block's first position.

    Args:
        blocks: its `keys` are written.
        k_cache: [num_slots, H_kv, D], floating, fp8 included; the keys of `written` and of the slots before them in
            their blocks are stored.
        written: int32 or int64 [N], the slots just written. Where one is its block's last, the block holds the
            consecutive tokens of one request.
        positions: int32 or int64 [N], of the tokens in `written`.
        k_scale: what a stored key is multiplied by.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "gate_keys"
    _check_blocks(op, blocks)
    kv_heads, dim = len(blocks.gate.key), blocks.gate.key.shape[1] // len(blocks.gate.pools)
    fits = k_cache.dim() == 3 and k_cache.shape[1:] == (kv_heads, dim) and k_cache.is_floating_point()
    expected = f"k_cache floating [num_slots, {kv_heads}, {dim}]"
    require(fits, op, expected, f"{k_cache.dtype} {list(k_cache.shape)}")
    _check_integers(op, "written", written)
    _check_integers(op, "positions", positions, len(written))
    require_one_device(op, blocks.keys, k_cache, written, positions)
    require_rows(op, k_cache, written, positions)
    make = implementation_of(reference.gate_keys, implementation, k_cache)
    make(blocks, k_cache, written, positions, k_scale=k_scale)


def score_blocks(
    q: Tensor,
    blocks: GatedBlocks,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    score_beyond: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """What the gate makes of each block before the current token's, for each KV head.

    Args:
        q: [B, H, D], floating, rotated: queries of the last position of each row; H is a multiple of H_kv.
        blocks: as `gate_keys` left them.
        slots: int32 [B, L], KV slot of each position; positions n b … n b + n - 1 are the slots of one block.
        seq_lens: int32 or int64 [B].
        score_beyond: rows no longer than this are not scored.

    Returns:
        float32 [B, H_kv, ceil(L / n)]: the products of the gate's queries and keys over the root of its width,
        undefined from a row's last block on, and in rows that are not scored.

    Raises:
        ValueError: as `gate_keys`.
    """
    op = "score_blocks"
    _check_blocks(op, blocks)
    gate = blocks.gate
    kv_heads, dim = len(gate.key), gate.key.shape[1] // len(gate.pools)
    heads = kv_heads * (gate.query.shape[1] // dim)
    fits = q.dim() == 3 and q.is_floating_point() and q.shape[1:] == (heads, dim)
    require(fits, op, f"q floating [B, {heads}, {dim}]", f"{q.dtype} {list(q.shape)}")
    fits = slots.dim() == 2 and slots.dtype == torch.int32 and len(slots) == len(q)
    require(fits, op, f"slots int32 [{len(q)}, L]", f"{slots.dtype} {list(slots.shape)}")
    _check_integers(op, "seq_lens", seq_lens, len(q))
    require_one_device(op, blocks.keys, q, slots, seq_lens)
    require_rows(op, q, slots, seq_lens)
    score = implementation_of(reference.score_blocks, implementation, q)
    return score(q, blocks, slots, seq_lens, score_beyond=score_beyond)


def _check_blocks(op: str, blocks: GatedBlocks) -> None:
    gate, keys, table = blocks.gate, blocks.keys, blocks.rotation.table
    kv_heads, inputs, width = gate.query.shape
    pools = gate.pools
    require(pools != () and set(pools) <= set(POOLS), op, f"pools among {', '.join(POOLS)}", pools)
    fits = gate.key.shape[0] == kv_heads and gate.key.shape[2] == width and gate.key.shape[1] % len(pools) == 0
    fits = fits and inputs % (gate.key.shape[1] // len(pools)) == 0
    expected = f"weights [H_kv, G * D, d] and [H_kv, {len(pools)} * D, d]"
    require(fits, op, expected, f"{list(gate.query.shape)} and {list(gate.key.shape)}")
    require(width >= 16 and width & (width - 1) == 0, op, "a gate as wide as a power of two of 16 or more", width)
    fits = keys.dim() == 3 and keys.shape[1:] == (kv_heads, width) and keys.is_floating_point() and keys.itemsize > 1
    fits = fits and keys.is_contiguous() and gate.query.is_contiguous() and gate.key.is_contiguous()
    expected = f"contiguous keys of at least 16 bits [blocks, {kv_heads}, {width}], and contiguous weights"
    require(fits, op, expected, f"{keys.dtype} {list(keys.shape)}")
    require(blocks.block & (blocks.block - 1) == 0, op, "a power of two of tokens a block", blocks.block)
    for norm in (gate.query_norm, gate.key_norm):
        require(norm is None or norm.shape == (width,), op, f"norms [{width}]", None if norm is None else norm.shape)
    _check_table(op, table)
    if gate.rotation is not None:
        _check_table(op, gate.rotation.table)
        turns = gate.rotation.table.shape[1]
        require(turns == width and not gate.rotation.interleaved, op, f"a rotation of halves of {width}", turns)


def _check_table(op: str, table: Tensor) -> None:
    fits = table.dim() == 2 and table.dtype == torch.float32 and table.is_contiguous() and table.shape[1] % 2 == 0
    require(fits, op, "a contiguous rotation table float32 [positions, R], R even", f"{table.dtype} {table.shape}")


def _check_integers(op: str, name: str, tensor: Tensor, count: int | None = None) -> None:
    fits = tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 1 and count in (None, len(tensor))
    expected = f"{name} int32 or int64 [{'N' if count is None else count}]"
    require(fits, op, expected, f"{tensor.dtype} {list(tensor.shape)}")
