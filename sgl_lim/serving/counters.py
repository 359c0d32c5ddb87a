"""What sparse decode saved, counted on the KV pool's device so that a step never waits for it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lim_kernels.count_decode_step import TOTALS, Layers, Ledger, Sharing, count_decode_step, count_sets
from sgl_lim.methods import Role
from sgl_lim.serving.draft_sets import Drafts
from sgl_lim.serving.reads import Plan

COUNTERS = {
    "decode_steps": "Decode steps run by the lessismore backend whose results were kept; a verification is one",
    "tokens_attended": "KV tokens that decode attended to, over all layers",
    "tokens_scored": "KV tokens whose keys alone a selection layer read, to rank them: half of a token's bytes each",
    "tokens_dense": "KV tokens a dense decode would have attended to, over all layers",
    "selections": "Token sets chosen, over rows and the layers that choose",
    "tokens_shared": "KV tokens not read again, because they were read for another row of a prefix group",
    "rows_grouped": "Rows that were in a prefix group, summed over decode steps",
    "warm_starts": "Requests that began with a set that earlier selections had left on their KV slots",
    "draft_tokens_attended": "Of tokens_attended, those that drafts attended to, accepted or not",
    "requests": "Requests that decoded",
    "requests_dense": "Requests that never exceeded the token budget",
}
"""What is counted since the server started, by the name under which `/server_info` and `/metrics` show it."""
NOT_MONOTONE = "requests_dense"
"""A request leaves this count when it outgrows the budget, so it is no counter of Prometheus."""


class Counters:
    """Totals since the server started, `COUNTERS`.

    Tokens are counted over all layers of all rows. A request that was retracted and resumed counts again. What SGLang
    throws away does not count: its overlap scheduler launches a decode step before it knows the results of the step
    before, and a request that had finished, or was retracted, is in that step for nothing.

    Args:
        budget: the method's, in tokens.
        roles: of the model's layers.
        num_rows: of the request pool.
        keys_alone: whether selection layers read the context by its keys alone, and attend to the set that they choose.
        overlap: whether the scheduler launches a step ahead of the results that it has looked at. The newest step then
            shows when the next one has been launched, or the server is idle.
    """

    def __init__(
        self,
        budget: int,
        roles: Sequence[Role],
        num_rows: int,
        device: torch.device,
        *,
        keys_alone: bool = False,
        overlap: bool = False,
    ) -> None:
        self._budget, self._roles, self._overlap = budget, tuple(roles), overlap
        self._by_role = {role: self._roles.count(role) for role in Role}
        self._layers = Layers(
            all=len(self._roles),
            sparse=self._by_role[Role.SPARSE] + self._by_role[Role.OWN],
            selecting=self._by_role[Role.SELECT] + self._by_role[Role.OWN],
            scoring=self._by_role[Role.SELECT] if keys_alone else 0,
            early=self._by_role[Role.DENSE],
        )
        self._ledger = Ledger.empty(num_rows, device)
        self._generations = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._known = b""
        self._discarded: list[Tensor] = []
        self._unsettled = False

    def clear(self) -> None:
        """Nothing counts that ran so far; what captured graphs write stays where it is."""
        empty = Ledger.empty(len(self._generations), self._generations.device)
        for name, value in vars(empty).items():
            getattr(self._ledger, name).copy_(value)
        self._discarded.clear()

    def forget(self, rows: Tensor, where: Tensor | None = None) -> None:
        """A prefill runs on these rows of the request pool, so whoever decodes there next is new.

        Generations alone do not tell: the next turn of a streaming session keeps its row and its generation.

        Args:
            rows: int64 [B].
            where: bool [B], which of the rows are prefilled; None is all.
        """
        seen = self._ledger.seen
        seen[rows] = -1 if where is None else seen[rows].masked_fill(where, -1)

    def learn_generations(self, generations: Tensor) -> None:
        """Bring the tenancy of the request pool's rows to the device; before `record`, outside a captured graph.

        So too what `discard` was told: all of it is older than the step to come, and `record` relies on it.

        Args:
            generations: int64 [R] on the host (`ReqToTokenPool.req_generation`).
        """
        self._take_out()
        self._unsettled = True
        # Most steps admit nobody, and comparing bytes on the host is cheaper than a copy, or than `torch.equal`.
        seen = generations.numpy().tobytes()
        if seen == self._known:
            return
        self._known = seen
        # The pinned copy belongs to torch's allocator, which keeps it until the device has read it.
        source = generations.pin_memory() if self._generations.is_cuda else generations
        self._generations.copy_(source, non_blocking=True)

    def discard(self, rows: Tensor, places: Sequence[int]) -> None:
        """SGLang threw away what its last looked-at decode step computed for some rows.

        It says so before it launches the second step after that one, so nothing of it is in the totals yet.

        Args:
            rows: int64 [B] on the device, rows of the request pool in the order of the step's batch.
            places: of the rows in it that were thrown away.
        """
        which = torch.tensor(places, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
        self._discarded.append(rows[which])

    def settle(self) -> None:
        """The scheduler is idle and has looked at all results: count what is still pending."""
        if self._unsettled:
            self._take_out()
            self._ledger.settle()
            self._unsettled = False

    def record(self, rows: Tensor, plan: Plan) -> None:
        """Count one decode step; may be captured in a graph.

        Args:
            rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph.
        """
        groups, layers = plan.counted_groups(self._by_role)
        shared, sharing = plan.shared, None
        if groups is not None:
            sharing = Sharing(groups, layers, plan.set_groups, None if shared is None else shared.counts)
        count_decode_step(
            self._ledger,
            rows,
            self._generations,
            plan.seq_lens,
            self._layers,
            budget=self._budget,
            actions=None if plan.kept is None else plan.kept.actions,
            sharing=sharing,
        )

    def record_round(self, rows: Tensor, lens: Tensor, accept_lens: Tensor, drafts: int, lossless: Drafts) -> None:
        """Count one verification and the drafts before it; waits for nothing.

        Only tokens that were kept are in `tokens_dense`. A verification reads a row once for all its tokens.

        Args:
            rows: integer [B], rows of the request pool; row 0 only pads.
            lens: integer [B], tokens of each row before those that were verified.
            accept_lens: integer [B], tokens that were kept, 1 … drafts + 1: the one that was known is one of them.
            drafts: verified of each row.
            lossless: whose draft steps these were.
        """
        rows, lens, kept = rows.long(), lens.to(torch.int64), accept_lens.to(torch.int64)
        real = rows != 0
        ledger, scoring = self._ledger, 0 if lossless.sets is None else lossless.sets.layers
        outgrew = lens + 1 > self._budget
        new = ledger.seen[rows] != self._generations[rows]
        before = (ledger.sparse[rows] != 0) & ~new
        read = lossless.take_read(rows)
        amounts = {
            **dict.fromkeys(TOTALS, torch.zeros_like(lens)),
            "decode_steps": torch.ones_like(lens),
            "draft_tokens_attended": read,
            "tokens_attended": self._layers.all * (lens + drafts + 1) + read,
            "tokens_dense": self._layers.all * (kept * lens + kept * (kept + 1) // 2),
            "tokens_scored": scoring * outgrew * (lens + 1),
            "selections": scoring * outgrew,
            "requests": new,
            "requests_sparse": outgrew & ~before,
        }
        by_row = torch.stack([amounts[name].to(torch.int64) for name in TOTALS], dim=1)
        ledger.enter(rows, by_row * real.unsqueeze(1))
        ledger.seen[rows] = torch.where(real, self._generations[rows], ledger.seen[rows])
        ledger.sparse[rows] = ((before | outgrew) & real).to(ledger.sparse.dtype)

    def record_sets(self, layer: int, rows: Tensor, plan: Plan, *, differ: bool = False) -> None:
        """Count the set in force as long as it is; after `record`, may be captured in a graph.

        Args:
            layer: which chose it; the sparse layers from there to the next selection attend to it, and so does the
                layer itself where it reads the context by its keys alone. Of layers that choose for themselves the
                first speaks for all, as their sets are as long.
            rows: as `record` had them.
            differ: whether sets of layers that choose for themselves differ in length, so that each has to speak.
        """
        assert plan.chosen is not None
        if self._roles[layer] is Role.OWN and differ:
            layers = 1
        elif self._roles[layer] is Role.OWN:
            layers = self._by_role[Role.OWN] if self._roles.index(Role.OWN) == layer else 0
        else:
            readers = itertools.takewhile(lambda role: role is Role.SPARSE, self._roles[layer + 1 :])
            layers = sum(1 for _ in readers) + (self._layers.scoring > 0)
        if layers:
            count_sets(self._ledger, rows, plan.seq_lens, plan.chosen.ends, budget=self._budget, layers=layers)

    @property
    def generations(self) -> Tensor:
        """int64 [R] on the device, tenancy of the request pool's rows, as learnt last."""
        return self._generations

    @property
    def totals(self) -> Tensor:
        """int64 [len(TOTALS)] on the device, as `named` takes them.

        To be asked for on the stream of the steps, or while none runs.
        """
        self._take_out()
        return self._ledger.settled(in_flight=self._overlap)

    def read(self) -> dict[str, int]:
        """Totals by name, which never go down but for NOT_MONOTONE. Waits for the device."""
        if self._generations.is_cuda:
            # A step that runs meanwhile on its own stream could be seen half counted.
            torch.cuda.synchronize(self._generations.device)
        return named(self.totals)

    def _take_out(self) -> None:
        """Bring what was discarded to the ledger."""
        for rows in self._discarded:
            self._ledger.discard(rows)
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream(rows.device))
        self._discarded.clear()


def named(totals: Tensor) -> dict[str, int]:
    """Totals by name, as `COUNTERS` has them: the device counts requests that exceeded the budget, not the others."""
    values = dict(zip(TOTALS, totals.tolist(), strict=True))
    values[NOT_MONOTONE] = values["requests"] - values.pop("requests_sparse")
    return {name: values[name] for name in COUNTERS}
