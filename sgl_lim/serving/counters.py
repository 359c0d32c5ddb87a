"""What sparse decode saved, counted on the KV pool's device so that a step never waits for it."""

import itertools

import torch
from torch import Tensor

from lim_kernels.count_decode_step import TOTALS, Ledger, count_decode_step, count_sets
from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods import Method, Role, SharedSets


class Counters:
    """Totals since the server started.

    `tokens_attended` and `tokens_dense` count KV tokens read by all layers of all rows, ours and a dense decode's.
    `tokens_shared` counts those of them that a layer found read already, for another row of the prefix group, and
    `rows_grouped` the rows in prefix groups, step by step. `warm_starts` counts requests that began with a set that
    earlier selections had left on their slots.
    `requests` counts requests that decoded (one that was retracted and resumed counts again).
    """

    def __init__(self, method: Method, num_layers: int, num_rows: int, device: torch.device) -> None:
        roles = method.layer_roles(num_layers)
        self._budget = method.budget
        self._layers = {role: roles.count(role) for role in Role}
        self._roles = roles
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

    def record(
        self,
        rows: Tensor,
        seq_lens: Tensor,
        groups: PrefixGroups | None = None,
        grouped_roles: tuple[Role, ...] = (),
        acts: Tensor | None = None,
        shared: SharedSets | None = None,
    ) -> None:
        """Count one decode step; may be captured in a graph.

        Args:
            rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph.
            seq_lens: int32 or int64 [B].
            groups: the batch's prefix groups; grouped_roles: roles of the layers that read a group once.
            acts: as in `count_decode_step`.
            shared: the sets' groups, where sparse layers read them once.
        """
        count_decode_step(
            self._ledger,
            rows,
            self._generations,
            seq_lens,
            budget=self._budget,
            num_layers=sum(self._layers.values()),
            sparse_layers=self._layers[Role.SPARSE] + self._layers[Role.OWN],
            selection_layers=self._layers[Role.SELECT] + self._layers[Role.OWN],
            actions=acts,
            early_layers=self._layers[Role.DENSE],
            groups=groups,
            grouped_layers=sum(self._layers[role] for role in grouped_roles),
            set_groups=None if shared is None else shared.in_sets,
            set_counts=None if shared is None else shared.counts,
        )

    def record_sets(self, layer: int, rows: Tensor, seq_lens: Tensor, set_counts: Tensor) -> None:
        """Count the sets that a layer chose as long as they are; after `record`, may be captured in a graph.

        Args:
            layer: which chose them; the sparse layers from there to the next selection attend to them. Of layers that
                choose for themselves the first speaks for all, as their sets are as long.
            rows, seq_lens: as `record` had them; set_counts: int32 [B] or [B, H_kv].
        """
        if self._roles[layer] is Role.OWN:
            layers = self._layers[Role.OWN] if self._roles.index(Role.OWN) == layer else 0
        else:
            readers = itertools.takewhile(lambda role: role is Role.SPARSE, self._roles[layer + 1 :])
            layers = sum(1 for _ in readers)
        if layers:
            count_sets(self._ledger, rows, seq_lens, set_counts, budget=self._budget, layers=layers)

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
