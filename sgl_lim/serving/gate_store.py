"""Gate keys of each block of the KV pool, layer by layer, for methods whose layers choose blocks by gates.

They belong to physical blocks, as `page_store` keeps its bounds, and whoever completes a block writes them: prefills,
mixed steps and decode steps, within a captured graph too. A row ranks only blocks before its last one. All of those are
complete, and were completed by the row's request or by one whose prefix it shares. So neither eviction, flush, retract
nor reuse can leave a key that is read and does not belong: a new owner's key is written when its block is complete,
which is before any row ranks it.

KV that nobody here wrote has no keys yet: those of a request are made when it first decodes (`arrivals`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lim_kernels import gate_keys
from lim_kernels.block_gates import Gate, GatedBlocks, Rotation
from sgl_lim.serving.key_scales import key_scale


class GateStore:
    """Gate keys by layer.

    Args:
        pool: SGLang's KV pool of this rank; its page size is a multiple of `block`.
        gates: of each layer that chooses blocks, for the KV heads of this rank, on the pool's device.
        rotations: how the model rotates queries and keys in each of these layers.
        attentions: SGLang's attention of each of these layers, which knows the scale of its stored keys.
        block: tokens a block.
    """

    def __init__(
        self,
        pool: Any,
        gates: Mapping[int, Gate],
        rotations: Mapping[int, Rotation],
        attentions: Mapping[int, Any],
        block: int,
    ) -> None:
        self._pool, self._attentions, self._block = pool, attentions, block
        self._blocks: dict[int, GatedBlocks] = {}
        count = -(-(pool.size + pool.page_size) // block)
        for layer, gate in gates.items():
            # [blocks, H_kv, d]
            keys = torch.zeros(
                count, len(gate.key), gate.width, dtype=gate.key.dtype, device=pool.get_key_buffer(layer).device
            )
            self._blocks[layer] = GatedBlocks(gate, keys, block, rotations[layer])

    def learn(self, layer: int, slots: Tensor, positions: Tensor) -> None:
        """Make the keys of the blocks that slots just completed, if `layer` chooses blocks; may be captured in a graph.

        Args:
            slots: int32 or int64 [N]; SGLang's `out_cache_loc`.
            positions: int32 or int64 [N], of the tokens in them.
        """
        blocks = self._blocks.get(layer)
        if blocks is not None:
            k_scale = key_scale(self._attentions[layer])
            gate_keys(blocks, self._pool.get_key_buffer(layer), slots, positions, k_scale=k_scale)

    def learn_rows(self, slots: Tensor, lens: Tensor) -> None:
        """Make the keys of all complete blocks of rows in every layer that chooses blocks: nobody saw them completed.

        Args:
            slots: int32 [b, L], KV slot of each position; lens: int64 [b], positions that have keys.
        """
        lasts = torch.arange(1, slots.shape[1] // self._block + 1, device=slots.device) * self._block - 1
        # Slot 0 is padding: it is the last of no block. Slots are int64 as in a step, for which the kernel is compiled.
        ends = slots[:, self._block - 1 :: self._block].long().where(lasts < lens.unsqueeze(1), 0)
        positions = lasts.repeat(len(slots))
        for layer in self._blocks:
            self.learn(layer, ends.flatten(), positions)

    def of_layer(self, layer: int) -> GatedBlocks | None:
        """What `layer` chooses by; None for layers that do not choose blocks."""
        return self._blocks.get(layer)

    @property
    def nbytes(self) -> int:
        """Memory of the gate keys, without the gates."""
        return sum(blocks.keys.nbytes for blocks in self._blocks.values())
