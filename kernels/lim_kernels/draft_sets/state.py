"""What is remembered of the sets by which tokens are drafted."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftSizes:
    """What a draft attends to."""

    budget: int
    """Tokens in a set, at most; a row that is no longer is read whole."""
    sinks: int
    """Leading tokens that a row without a set attends to, beside the last ones."""
    room: int
    """Tokens behind a set, at most, that are read with it: those since the set was chosen."""

    @property
    def width(self) -> int:
        """Places of a draft's read."""
        return self.budget + self.room


@dataclass(frozen=True)
class DraftMemory:
    """Sets of S selection layers for R rows of the request pool, H sets a row; contiguous, on one device."""

    sets: Tensor
    """int32 [S, R, H, K], positions."""
    counts: Tensor
    """int32 [S, R, H], tokens in each set."""
    lengths: Tensor
    """int32 [R], length of the row when its sets were chosen, the token that chose them included."""
    tenants: Tensor
    """int64 [R], who had the row then, -1 for nobody."""

    @staticmethod
    def empty(layers: int, rows: int, heads: int, budget: int, device: torch.device | str) -> "DraftMemory":
        """No row has a set."""
        return DraftMemory(
            sets=torch.zeros(layers, rows, heads, budget, dtype=torch.int32, device=device),
            counts=torch.zeros(layers, rows, heads, dtype=torch.int32, device=device),
            lengths=torch.zeros(rows, dtype=torch.int32, device=device),
            tenants=torch.full((rows,), -1, dtype=torch.int64, device=device),
        )
