"""Public entry of step accounting: validates operands and dispatches."""

import torch
from torch import Tensor

from lim_kernels.count_decode_step import reference
from lim_kernels.count_decode_step.ledger import Layers, Ledger, Sharing
from lim_kernels.dispatch import implementation_of, require, require_rows


def count_decode_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    layers: Layers,
    *,
    budget: int,
    actions: Tensor | None = None,
    sharing: Sharing | None = None,
    implementation: str | None = None,
) -> None:
    """Count one decode step; it is pending until the second step after it, as `Ledger` says.

    Args:
        rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph and is not counted.
        generations: int64 [R], tenancy of each row.
        seq_lens: int32 or int64 [B], the current token included.
        layers: how the model's layers read.
        budget: token budget.
        actions: uint8 [B], bits of `lim_kernels.row_actions`. None: all rows longer than the budget select.
        sharing: what rows read together, if anything.

    Raises:
        ValueError: wrong shape, or an unknown implementation.
    """
    op = "count_decode_step"
    require(rows.dim() == 1 and rows.shape == seq_lens.shape, op, "rows and seq_lens [B]", list(rows.shape))
    require(generations.shape == ledger.seen.shape, op, f"generations {list(ledger.seen.shape)}", generations.shape)
    require_rows(op, rows, generations, seq_lens, actions)
    require(
        actions is None or actions.shape == rows.shape,
        op,
        f"actions {list(rows.shape)}",
        actions is not None and actions.shape,
    )
    if sharing is not None:
        _check_sharing(op, rows, sharing)
    count = implementation_of(reference.count_decode_step, implementation, rows)
    count(ledger, rows, generations, seq_lens, layers, budget=budget, actions=actions, sharing=sharing)


def _check_sharing(op: str, rows: Tensor, sharing: Sharing) -> None:
    given = [part is not None for part in (sharing.in_sets, sharing.set_counts)]
    require(given in ([False] * 2, [True] * 2), op, "in_sets and set_counts together", given)
    counts = sharing.set_counts
    require(counts is None or counts.shape == rows.shape, op, f"set_counts {list(rows.shape)}", counts)
    require_rows(op, counts)


def count_sets(
    ledger: Ledger,
    rows: Tensor,
    seq_lens: Tensor,
    set_counts: Tensor,
    *,
    budget: int,
    layers: int,
    implementation: str | None = None,
) -> None:
    """Correct `tokens_attended` of the newest step, whose sets have fewer tokens than `count_decode_step` took them to.

    Args:
        rows, seq_lens, budget: of the step, as `count_decode_step` had them.
        set_counts: int32 [B] or [B, H_kv], tokens in each row's set or in those of its KV heads, which share the
            layer evenly: what remains of a row is rounded down to a whole token.
        layers: how many layers attend to these sets.

    Raises:
        ValueError: wrong shape or dtype, or an unknown implementation.
    """
    op = "count_sets"
    require(rows.dim() == 1 and rows.shape == seq_lens.shape, op, "rows and seq_lens [B]", list(rows.shape))
    fits = set_counts.dim() in (1, 2) and set_counts.shape[:1] == rows.shape and set_counts.is_contiguous()
    require(fits, op, f"contiguous set_counts [{len(rows)}] or [{len(rows)}, H_kv]", list(set_counts.shape))
    require(set_counts.dtype == torch.int32, op, "set_counts int32", set_counts.dtype)
    require_rows(op, rows, seq_lens)
    count = implementation_of(reference.count_sets, implementation, rows)
    count(ledger, rows, seq_lens, set_counts, budget=budget, layers=layers)
