"""What sparse decode saved, counted on the KV pool's device so that a step never waits for it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lim_kernels.count_decode_step import TOTALS, Ledger, count_decode_step, count_sets
from sgl_lim.methods import Role
from sgl_lim.serving.reads import Plan

COUNTERS = {
    "decode_steps": "Decode steps run by the lessismore backend",
    "tokens_attended": "KV tokens read in decode, over all layers",
    "tokens_dense": "KV tokens a dense decode would have read, over all layers",
    "selections": "Token sets chosen, over rows and the layers that choose",
    "tokens_shared": "KV tokens not read again, because they were read for another row of a prefix group",
    "rows_grouped": "Rows that were in a prefix group, summed over decode steps",
    "warm_starts": "Requests that began with a set that earlier selections had left on their KV slots",
    "requests": "Requests that decoded",
    "requests_dense": "Requests that never exceeded the token budget",
}
"""What is counted since the server started, by the name under which `/server_info` and `/metrics` show it."""
NOT_MONOTONE = "requests_dense"
"""A request leaves this count when it outgrows the budget, so it is no counter of Prometheus."""


class Counters:
    """Totals since the server started, `COUNTERS`.

    Tokens are counted over all layers of all rows. A request that was retracted and resumed counts again.
    """

    def __init__(self, budget: int, roles: Sequence[Role], num_rows: int, device: torch.device) -> None:
        self._budget, self._roles = budget, tuple(roles)
        self._layers = {role: self._roles.count(role) for role in Role}
        self._ledger = Ledger(
            totals=torch.zeros(len(TOTALS), dtype=torch.int64, device=device),
            seen=torch.full((num_rows,), -1, dtype=torch.int64, device=device),
            sparse=torch.zeros(num_rows, dtype=torch.uint8, device=device),
        )
        self._generations = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._known = b""

    def forget(self, rows: Tensor, where: Tensor | None = None) -> None:
        """A prefill runs on these rows of the request pool, so whoever decodes there next is new.

        Generations alone do not tell: disaggregated decode counts them from zero again when its cache is flushed.

        Args:
            rows: int64 [B].
            where: bool [B], which of the rows are prefilled; None is all.
        """
        seen = self._ledger.seen
        seen[rows] = -1 if where is None else seen[rows].masked_fill(where, -1)

    def learn_generations(self, generations: Tensor) -> None:
        """Bring the tenancy of the request pool's rows to the device; before `record`, outside a captured graph.

        Args:
            generations: int64 [R] on the host (`ReqToTokenPool.req_generation`).
        """
        # Most steps admit nobody, and comparing bytes on the host is cheaper than a copy, or than `torch.equal`.
        seen = generations.numpy().tobytes()
        if seen == self._known:
            return
        self._known = seen
        # The pinned copy belongs to torch's allocator, which keeps it until the device has read it.
        source = generations.pin_memory() if self._generations.is_cuda else generations
        self._generations.copy_(source, non_blocking=True)

    def record(self, rows: Tensor, plan: Plan) -> None:
        """Count one decode step; may be captured in a graph.

        Args:
            rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph.
        """
        groups, grouped_layers = plan.counted_groups(self._layers)
        count_decode_step(
            self._ledger,
            rows,
            self._generations,
            plan.seq_lens,
            budget=self._budget,
            num_layers=len(self._roles),
            sparse_layers=self._layers[Role.SPARSE] + self._layers[Role.OWN],
            selection_layers=self._layers[Role.SELECT] + self._layers[Role.OWN],
            actions=None if plan.kept is None else plan.kept.actions,
            early_layers=self._layers[Role.DENSE],
            groups=groups,
            grouped_layers=grouped_layers,
            set_groups=plan.set_groups,
            set_counts=None if plan.shared is None else plan.shared.counts,
        )

    def record_sets(self, layer: int, rows: Tensor, plan: Plan) -> None:
        """Count the set in force as long as it is; after `record`, may be captured in a graph.

        Args:
            layer: which chose it; the sparse layers from there to the next selection attend to it. Of layers that
                choose for themselves the first speaks for all, as their sets are as long.
            rows: as `record` had them.
        """
        assert plan.chosen is not None
        if self._roles[layer] is Role.OWN:
            layers = self._layers[Role.OWN] if self._roles.index(Role.OWN) == layer else 0
        else:
            readers = itertools.takewhile(lambda role: role is Role.SPARSE, self._roles[layer + 1 :])
            layers = sum(1 for _ in readers)
        if layers:
            count_sets(self._ledger, rows, plan.seq_lens, plan.chosen.ends, budget=self._budget, layers=layers)

    @property
    def generations(self) -> Tensor:
        """int64 [R] on the device, tenancy of the request pool's rows, as learnt last."""
        return self._generations

    @property
    def totals(self) -> Tensor:
        """int64 [len(TOTALS)] on the device, as `named` takes them."""
        return self._ledger.totals

    def read(self) -> dict[str, int]:
        """Totals by name. Waits for the device."""
        return named(self.totals)


def named(totals: Tensor) -> dict[str, int]:
    """Totals by name, as `COUNTERS` has them: the device counts requests that exceeded the budget, not the others."""
    values = dict(zip(TOTALS, totals.tolist(), strict=True))
    values[NOT_MONOTONE] = values["requests"] - values.pop("requests_sparse")
    return {name: values[name] for name in COUNTERS}
