"""Specification of the row snapshot in plain torch."""

from torch import Tensor


def copy_rows(table: Tensor, rows: Tensor, seq_lens: Tensor, slots: Tensor, lens: Tensor, *, longest: int) -> None:
    """See `api.copy_rows`."""
    slots[:, :longest] = table[:, :longest].index_select(0, rows)
    lens.copy_(seq_lens)
