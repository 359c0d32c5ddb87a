"""Requests whose KV came without a prefill that this backend saw: from a prefill server, host memory or a store.

What is kept of KV slots (bounds of pages, gate keys, times of selections) is learnt from whoever writes them. Such a
request is learnt when it decodes for the first time: its pages are bounded, or gate keys of its complete blocks are
made, and what its slots remember is forgotten, as it may be that of an earlier owner. It is known by its row of
SGLang's request pool having a new tenant, which the host knows. So a step without a new request costs nothing on the
device, and none waits for it.
"""

from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor


class Arrivals:
    """Which rows of a batch decode for the first time.

    Args:
        pool: SGLang's request pool.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._known = pool.req_generation.numpy().copy()
        self._rows: Tensor | None = None
        _of_pool[id(pool)] = self

    def note(self, rows: Tensor | None) -> None:
        """The batch that runs next has these rows of the request pool, int64 [B] on the host."""
        self._rows = rows

    def take(self, slots: Tensor, forward_batch: Any) -> tuple[Tensor, Tensor] | None:
        """The rows of a decode step whose tenants have not decoded before; from now on they have.

        Args:
            slots: int32 [B, L], KV slot of each position.
            forward_batch: SGLang's; may be padded.

        Returns:
            int32 [b, L'], KV slots of those rows, and int64 [b], how many are there: all but the current token's.
            None if there are no such rows, and for steps that no scheduler asked for.
        """
        noted, self._rows = self._rows, None
        if noted is None:
            return None
        rows, tenants = noted.numpy(), self._pool.req_generation.numpy()
        places = np.flatnonzero(tenants[rows] != self._known[rows])
        if not len(places):
            return None
        self._known[rows] = tenants[rows]
        on_host = forward_batch.seq_lens_cpu
        longest = slots.shape[1] if on_host is None else int(on_host[places].max())
        where = torch.from_numpy(places)
        where = where.pin_memory().to(slots.device, non_blocking=True) if slots.is_cuda else where
        return slots[where, :longest], forward_batch.seq_lens[where].long() - 1


_of_pool: "WeakValueDictionary[int, Arrivals]" = WeakValueDictionary()
"""By the identity of the request pool, which stays as long as they do."""


def note_batch(pool: Any, rows: Tensor | None) -> None:
    """SGLang is about to run a batch with these rows of a request pool, int64 [B] on the host."""
    arrivals = _of_pool.get(id(pool))
    if arrivals is not None:
        arrivals.note(rows)
