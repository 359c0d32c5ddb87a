"""What sparse decode saved, counted on the KV pool's device so that a step never waits for it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lim_kernels.count_decode_step import TOTALS, Ledger, count_decode_step, count_sets
from sgl_lim.methods import Role
from sgl_lim.serving.reads import Plan


class Counters:
    """Totals since the server started.

    `tokens_attended` and `tokens_dense` count KV tokens read by all layers of all rows, ours and a dense decode's.
    `tokens_shared` counts those of them that a layer found read already, for another row of the prefix group, and
    `rows_grouped` the rows in prefix groups, step by step. `warm_starts` counts requests that began with a set that
    earlier selections had left on their slots.
    `requests` counts requests that decoded (one that was retracted and resumed counts again).
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
        """int64 [9] on the device, as `named` takes them."""
        return self._ledger.totals

    def read(self) -> dict[str, int]:
        """Totals by name. Waits for the device."""
        return named(self.totals)


def named(totals: Tensor) -> dict[str, int]:
    """Totals by name, with `requests_dense` for requests that never exceeded the budget."""
    values = dict(zip(TOTALS, totals.tolist(), strict=True))
    values["requests_dense"] = values["requests"] - values.pop("requests_sparse")
    return values
