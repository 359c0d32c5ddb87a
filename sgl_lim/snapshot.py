"""A decode step's slots and lengths, copied out of the scheduler's request pool before the step runs.

Under the overlap scheduler the pool's rows are rewritten while a step runs (a request finishes, a prefill's duplicate
slots are freed), and a captured graph may run only after SGLang declared the pool read. So rows are copied when SGLang
prepares the step's metadata, into buffers that stay where captured graphs expect them.
"""

from typing import Any

import torch
from torch import Tensor

from lim_kernels import copy_rows


class Snapshot:
    """Copies of the rows of one batch at a time.

    Args:
        table: int32 [R, T], SGLang's `ReqToTokenPool.req_to_token`.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        # Aligned rows load faster.
        self._width = -(-table.shape[1] // 16) * 16
        self._captured = self._allocate(0)
        self._eager = self._allocate(0)

    def reserve(self, rows: int) -> None:
        """Allocate the buffers that captured graphs of at most `rows` rows read; they never move afterwards."""
        if rows > len(self._captured[1]):
            self._captured = self._allocate(rows)

    def take(self, forward_batch: Any, *, captured: bool) -> None:
        """Copy the rows of a decode batch.

        Args:
            forward_batch: SGLang's batch, or the view of it that a graph is replayed with.
            captured: whether a captured graph will read the copy, which is then as wide as the pool's rows.
        """
        batch = forward_batch.batch_size
        on_host = forward_batch.seq_lens_cpu
        if not captured and batch > len(self._eager[1]):
            self._eager = self._allocate(batch)
        slots, lens = (buffer[:batch] for buffer in (self._captured if captured else self._eager))
        # Eagerly, what follows is sized by the longest row, which SGLang may leave out on the host to avoid waiting.
        longest = self._table.shape[1] if captured or on_host is None else int(on_host[:batch].max())
        copy_rows(self._table, forward_batch.req_pool_indices, forward_batch.seq_lens, slots, lens, longest=longest)
        self.slots = slots if captured else slots[:, :longest]
        self.seq_lens = lens

    slots: Tensor  # int32 [B, L], KV slot of each position of the rows copied last
    seq_lens: Tensor  # int32 [B], the current token included

    def _allocate(self, rows: int) -> tuple[Tensor, Tensor]:
        device = self._table.device
        # Zeros are the reserved padding slot, so that even a wrong read stays inside the pool.
        slots = torch.zeros(rows, self._width, dtype=torch.int32, device=device)
        return slots, torch.ones(rows, dtype=torch.int32, device=device)
