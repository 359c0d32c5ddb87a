"""A decode step's KV slots, copied out of the scheduler's request pool before the step runs.

Under the overlap scheduler the pool's rows are rewritten while a step runs (a request finishes, a prefill's duplicate
slots are freed), and a captured graph may run only after SGLang declared the pool read. So rows are copied when SGLang
prepares the step's metadata, into buffers that stay where captured graphs expect them. This is all that a step costs on
the host, so it is one call of torch: a Triton launch takes several times as long (80 us on the host of an H200).
"""

from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16
"""Rows of as many places as a multiple of this load faster."""


class Snapshot:
    """Copies of the rows of one batch at a time.

    Args:
        table: int32 [R, T], SGLang's `ReqToTokenPool.req_to_token`.
        room: columns left free before each row's slots, for whoever uses the copy.
    """

    slots: Tensor
    """int32 [B, L], KV slot of each position of the rows copied last; what lies beyond a row's length is undefined."""
    extended: Tensor
    """int32 [B, room + L], `slots` with the columns before them."""

    def __init__(self, table: Tensor, room: int = 0) -> None:
        self._table, self._room = table, room
        self._width = room + -(-table.shape[1] // _ALIGNED) * _ALIGNED
        self._captured = self._allocate(0, self._width)
        self._eager = self._allocate(0, self._width)

    def reserve(self, rows: int) -> None:
        """Allocate the buffer that captured graphs of at most `rows` rows read; it never moves afterwards.

        Raises:
            RuntimeError: graphs of fewer rows read the buffer already.
        """
        if rows > len(self._captured) > 0:
            raise RuntimeError(
                f"graphs of {rows} rows cannot read what graphs of {len(self._captured)} rows were captured with; "
                "capture the largest batch first, or give --cuda-graph-bs that every graph can have"
            )
        if rows > len(self._captured):
            self._captured = self._allocate(rows, self._width)

    def take(self, forward_batch: Any, *, captured: bool, beyond: int = 0) -> None:
        """Copy the rows of a decode batch, or of one that is verified.

        Args:
            forward_batch: SGLang's batch, or the view of it that a graph is replayed with.
            captured: whether a captured graph will read the copy, which is then as wide as the pool's rows.
            beyond: tokens of each row that its length does not count yet.
        """
        batch = forward_batch.batch_size
        # SGLang may leave lengths out on the host to avoid waiting for the device.
        on_host = forward_batch.seq_lens_cpu
        widest = self._table.shape[1]
        longest = widest if on_host is None else min(widest, int(on_host[:batch].max()) + beyond)
        extended = self._captured[:batch] if captured else self._eager_rows(batch, self._room + longest)
        slots = extended[:, self._room :]
        torch.index_select(self._table[:, :longest], 0, forward_batch.req_pool_indices, out=slots[:, :longest])
        # Eagerly, what follows is sized by the longest row.
        self.extended = extended if captured else extended[:, : self._room + longest]
        self.slots = self.extended[:, self._room :]

    def _eager_rows(self, rows: int, width: int) -> Tensor:
        """A buffer of so many rows, as wide as an eager step needs: batches beyond the graphs' are large and short."""
        width = -(-width // _ALIGNED) * _ALIGNED
        if rows * width > self._eager.numel():
            self._eager = self._allocate(rows, width)
        return self._eager.view(-1)[: rows * width].view(rows, width)

    def _allocate(self, rows: int, width: int) -> Tensor:
        # Zeros are the reserved padding slot, so that even a wrong read stays inside the pool.
        return torch.zeros(rows, width, dtype=torch.int32, device=self._table.device)
