"""What step accounting remembers, and the names of its totals."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.prefix_groups import PrefixGroups

TOTALS = (
    "decode_steps",
    "tokens_attended",
    "tokens_scored",
    "tokens_dense",
    "selections",
    "requests",
    "requests_sparse",
    "tokens_shared",
    "rows_grouped",
    "warm_starts",
    "draft_tokens_attended",
)
"""Names of the totals, in the order of `Ledger.totals`: the one place that says which number is which."""
STEPS = TOTALS.index("decode_steps")
"""Of a pending step this total is its rows; however many they are, they make one step."""


@dataclass(frozen=True)
class Layers:
    """How the layers of a model read; the same in every step."""

    all: int
    sparse: int
    """Layers in which every row attends to a set."""
    selecting: int
    """Layers that choose a set, where a row does not keep the one it has."""
    scoring: int = 0
    """Of those, layers that read the context by its keys alone, and attend to the set that they choose."""
    early: int = 0
    """Layers in which rows with EARLY attend to a set."""


@dataclass(frozen=True)
class Sharing:
    """What the rows of a step read together."""

    groups: PrefixGroups
    """Of rows with equal leading tokens."""
    layers: int
    """How many layers read these once."""
    in_sets: PrefixGroups | None = None
    """As `groups_of_sets` gives them, where layers that attend to a set read the tokens of groups once."""
    set_counts: Tensor | None = None
    """int32 [B], with `in_sets`: tokens in each row's set. None: as many as the budget allows."""


@dataclass(frozen=True)
class Ledger:
    """What accounting remembers; all on one device.

    A step is pending until the second step after it begins: SGLang's overlap scheduler launches one step ahead of the
    results it has looked at, so only then is it known which rows of the step it threw away. `discard` takes such rows
    back out; whatever came into `totals` stays there.
    """

    totals: Tensor
    """int64 [len(TOTALS)], over all steps that are no longer pending."""
    pending: Tensor
    """int64 [2, len(TOTALS)], what each of the last two steps adds; a step lies at its number modulo 2."""
    steps: Tensor
    """int64 [1], steps so far: the number of the next one."""
    amounts: Tensor
    """int64 [R, len(TOTALS)], what each row of the request pool added in its last step."""
    last_steps: Tensor
    """int64 [R], the number of that step; -1 is none."""
    seen: Tensor
    """int64 [R], generation of the tenant that decoded last on each row of the request pool; -1 is none."""
    sparse: Tensor
    """uint8 [R], whether that tenant outgrew the budget."""

    @staticmethod
    def empty(num_rows: int, device: torch.device | str) -> "Ledger":
        """Nothing counted yet, for a request pool of so many rows."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return Ledger(
            totals=zeros(len(TOTALS)),
            pending=zeros(2, len(TOTALS)),
            steps=zeros(1),
            amounts=zeros(num_rows, len(TOTALS)),
            last_steps=zeros(num_rows) - 1,
            seen=zeros(num_rows) - 1,
            sparse=torch.zeros(num_rows, dtype=torch.uint8, device=device),
        )

    def enter(self, rows: Tensor, by_row: Tensor) -> None:
        """Make a step of these rows the newest one; waits for nothing.

        Args:
            rows: int64 [B], rows of the request pool; row 0 only pads a captured graph.
            by_row: int64 [B, len(TOTALS)], what each adds; nothing for row 0.
        """
        real = rows != 0
        place = self.steps % 2
        done = self.pending[place].squeeze(0)
        done[STEPS].clamp_(max=1)
        self.totals.add_(done)
        self.pending[place] = by_row.sum(0)
        self.amounts[rows] = torch.where(real.unsqueeze(1), by_row, self.amounts[rows])
        self.last_steps[rows] = torch.where(real, self.steps, self.last_steps[rows])
        self.steps.add_(1)

    def discard(self, rows: Tensor) -> None:
        """Take the last step of some rows back out, if it is pending; waits for nothing.

        This comes once for a finished request at most, so plain torch serves every device. What others did not read
        because such a row did stays counted as shared.

        Args:
            rows: int64 [n], rows of the request pool, each once.
        """
        steps = self.last_steps[rows]
        pending = (steps >= 0) & (steps >= self.steps - 2)
        self.pending.index_add_(0, steps % 2, self.amounts[rows] * -pending.to(torch.int64).unsqueeze(1))
        self.last_steps[rows] = -1

    def settled(self, *, in_flight: bool) -> Tensor:
        """int64 [len(TOTALS)], the totals with the pending steps that nothing will be taken out of any more.

        Args:
            in_flight: whether SGLang has yet to look at the newest step, which is then left out.
        """
        pending = self.pending.clone()
        pending[:, STEPS].clamp_(max=1)
        if in_flight:
            newest = (self.steps - 1) % 2
            pending *= torch.arange(2, device=newest.device).ne(newest).unsqueeze(1)
        return self.totals + pending.sum(0)

    def settle(self) -> None:
        """Nothing is in flight: take all pending steps into the totals."""
        self.totals.copy_(self.settled(in_flight=False))
        self.pending.zero_()
        self.last_steps.fill_(-1)
