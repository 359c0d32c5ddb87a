"""What sparse decode saved, counted on the KV pool's device so that a step never waits for it."""

import torch
from torch import Tensor

from sgl_lim.methods import Method, Role

NAMES = ("decode_steps", "tokens_attended", "tokens_dense", "selections", "requests", "requests_sparse")


class Counters:
    """Totals since the server started.

    `tokens_attended` and `tokens_dense` count KV tokens read by all layers of all rows, ours and a dense decode's.
    `requests` counts requests that decoded (one that was retracted and resumed counts again).
    """

    def __init__(self, method: Method, num_layers: int, num_rows: int, device: torch.device) -> None:
        roles = method.layer_roles(num_layers)
        self._num_layers = num_layers
        self._sparse_layers = sum(role is Role.SPARSE for role in roles)
        self._selection_layers = sum(role is Role.SELECT for role in roles)
        self._budget = method.budget
        self._totals = torch.zeros(len(NAMES), dtype=torch.int64, device=device)
        self._generations = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        self._sparse_rows = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def forget(self, rows: Tensor, where: Tensor | None = None) -> None:
        """A prefill runs on these rows of the request pool, so whoever decodes there next is new.

        Generations alone do not tell: SGLang counts them from zero again when its cache is flushed.

        Args:
            rows: int64 [B].
            where: bool [B], which of the rows are prefilled; None is all.
        """
        self._generations[rows] = -1 if where is None else self._generations[rows].masked_fill(where, -1)

    def record(self, rows: Tensor, generations: Tensor, seq_lens: Tensor, real: Tensor) -> None:
        """Count one decode step.

        Args:
            rows: int64 [B], rows of the request pool.
            generations: int64 [B], tenancy of each row (`ReqToTokenPool.req_generation`).
            seq_lens: int64 [B].
            real: bool [B], false for rows that only pad a captured graph.
        """
        lens = seq_lens.to(torch.int64) * real
        sparse = (lens > self._budget) if self._sparse_layers else torch.zeros_like(real)
        new = (self._generations[rows] != generations) & real
        before = self._sparse_rows[rows] & ~new
        kept = lens.clamp(max=self._budget)
        full_layers = self._num_layers - self._sparse_layers
        self._totals += torch.stack(
            [
                real.any().to(torch.int64),
                (full_layers * lens + self._sparse_layers * kept).sum(),
                self._num_layers * lens.sum(),
                self._selection_layers * sparse.sum(),
                new.sum(),
                (sparse & ~before).sum(),
            ]
        )
        self._generations[rows] = generations
        self._sparse_rows[rows] = before | sparse

    def read(self) -> dict[str, int]:
        """Totals by name, with `requests_dense` for those that never exceeded the budget. Waits for the device."""
        totals = dict(zip(NAMES, self._totals.tolist(), strict=True))
        totals["requests_dense"] = totals["requests"] - totals.pop("requests_sparse")
        return totals
