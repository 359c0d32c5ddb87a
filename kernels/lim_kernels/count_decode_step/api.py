"""Public entry of step accounting: validates operands and dispatches."""

import torch
from torch import Tensor

from lim_kernels.count_decode_step import reference
from lim_kernels.count_decode_step.ledger import Ledger
from lim_kernels.dispatch import implementation_of, require, require_rows
from lim_kernels.prefix_groups import PrefixGroups


def count_decode_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    num_layers: int,
    sparse_layers: int,
    selection_layers: int,
    actions: Tensor | None = None,
    early_layers: int = 0,
    groups: PrefixGroups | None = None,
    grouped_layers: int = 0,
    set_groups: PrefixGroups | None = None,
    set_counts: Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Count one decode step.

    Args:
        rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph and is not counted.
        generations: int64 [R], tenancy of each row.
        seq_lens: int32 or int64 [B], the current token included.
        budget: token budget; num_layers, sparse_layers, selection_layers: layers of the model by role.
        actions: uint8 [B], bits of `lim_kernels.row_actions`. None: all rows longer than the budget select.
        early_layers: layers in which rows with EARLY attend to a set.
        groups: the batch's prefix groups, if any layers use them; grouped_layers: how many do.
        set_groups, set_counts: as `groups_of_sets` gives them, where sparse layers read the tokens of groups once.
            None: they do not, and sets have as many tokens as the budget allows.

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
    given = [part is not None for part in (set_groups, set_counts)]
    require(given in ([False] * 2, [groups is not None] * 2), op, "set_groups and set_counts beside groups", given)
    require(set_counts is None or set_counts.shape == rows.shape, op, f"set_counts {list(rows.shape)}", set_counts)
    require_rows(op, set_counts)
    count = implementation_of(reference.count_decode_step, implementation, rows)
    count(
        ledger,
        rows,
        generations,
        seq_lens,
        budget=budget,
        num_layers=num_layers,
        sparse_layers=sparse_layers,
        selection_layers=selection_layers,
        actions=actions,
        early_layers=early_layers,
        groups=groups,
        grouped_layers=grouped_layers,
        set_groups=set_groups,
        set_counts=set_counts,
    )


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
    """Correct `tokens_attended` where sets have fewer tokens than `count_decode_step` took them to have.

    Args:
        rows, seq_lens, budget: of the step, as `count_decode_step` had them.
        set_counts: int32 [B] or [B, H_kv], tokens in each row's set or in those of its KV heads, which share the
            layer evenly: a remainder over the batch is rounded down to a whole token.
        layers: how many sparse layers attend to these sets.

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
