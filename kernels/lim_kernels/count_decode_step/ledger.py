"""What step accounting remembers, and the names of its totals."""

from dataclasses import dataclass

from torch import Tensor

TOTALS = (
    "decode_steps",
    "tokens_attended",
    "tokens_dense",
    "selections",
    "requests",
    "requests_sparse",
    "tokens_shared",
    "rows_grouped",
    "warm_starts",
)
"""Names of the totals, in the order of `Ledger.totals`: the one place that says which number is which."""


@dataclass(frozen=True)
class Ledger:
    """What accounting remembers; all on one device, all written by `count_decode_step`."""

    totals: Tensor
    """int64 [9], by TOTALS."""
    seen: Tensor
    """int64 [R], generation of the tenant that decoded last on each row of the request pool; -1 is none."""
    sparse: Tensor
    """uint8 [R], whether that tenant outgrew the budget."""
