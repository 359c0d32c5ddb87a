"""Public entry of the row snapshot: validates operands and dispatches."""

from torch import Tensor

from lim_kernels.copy_rows import reference
from lim_kernels.dispatch import default_for, require, require_rows, resolve

_IMPLEMENTATIONS = ("reference", "triton")


def copy_rows(
    table: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    lens: Tensor,
    *,
    longest: int,
    implementation: str | None = None,
) -> None:
    """Copy the slots of each row's tokens, and the lengths, to buffers that nobody else writes.

    Args:
        table: int32 [R, T], KV slot of each position of each row of the request pool.
        rows: int32 or int64 [B], rows of `table`.
        seq_lens: int32 or int64 [B], each 1 … longest.
        slots: int32 [B, W], written at positions before `seq_lens[b]`; the rest is undefined.
        lens: int32 [B], written.
        longest: a bound on `seq_lens` known on the host, at most W and T.

    Raises:
        ValueError: wrong shape or dtype, or an unknown implementation.
    """
    op = "copy_rows"
    require(rows.dim() == 1 and rows.shape == seq_lens.shape == lens.shape, op, "rows, seq_lens, lens [B]", rows.shape)
    require(slots.dim() == 2 and slots.shape[0] == len(rows), op, f"slots [{len(rows)}, W]", list(slots.shape))
    require(table.dtype == slots.dtype == lens.dtype, op, "int32 table, slots and lens", f"{table.dtype} {slots.dtype}")
    fits = longest <= min(slots.shape[1], table.shape[1])
    require(fits, op, f"longest at most {min(slots.shape[1], table.shape[1])}", longest)
    require_rows(op, table, rows, seq_lens, slots, lens)
    if resolve(op, implementation, _IMPLEMENTATIONS, default_for(table)) == "reference":
        copy = reference.copy_rows
    else:
        from lim_kernels.copy_rows.triton import copy_rows as copy
    copy(table, rows, seq_lens, slots, lens, longest=longest)
