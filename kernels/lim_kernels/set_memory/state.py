"""What the memory of sets holds, and what is decided from it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SetMemory:
    """Sets of S selection layers, for R rows of the request pool and N KV slots; contiguous, on one device."""

    sets: Tensor
    """int32 [S, R, M], the ranked part of each row's set, in positions."""
    stamps: Tensor
    """int32 [S, N], the step in which a selection chose each KV slot last, 0 for never."""
    tenants: Tensor
    """int64 [R], who decoded last on each row, -1 for nobody."""
    lengths: Tensor
    """int32 [R], that tenant's length then."""
    ages: Tensor
    """int32 [R], tokens since its set was chosen."""
    clock: Tensor
    """int32 [1], steps so far."""


@dataclass(frozen=True)
class Decision:
    """What each row of a step does: it attends to the set before its slots where it uses one, else to all slots."""

    actions: Tensor
    """uint8 [B], bits of `lim_kernels.row_actions`."""
    choose_lens: Tensor
    """int32 [B], lengths of rows that attend to everything at selection layers, 1 for the others."""
    select_uses_set: Tensor
    """uint8 [B], rows that use their set at selection layers."""
    select_ends: Tensor
    """int32 [B], end of what each row attends to there, in a row that has the set's K slots before its own."""
    early_uses_set: Tensor
    """uint8 [B], rows that use it in layers before the first selection layer."""
    early_ends: Tensor
    """int32 [B]."""
