"""Public entry of step accounting: validates operands and dispatches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.count_step import reference
from lim_kernels.dispatch import default_for, require, require_rows, resolve
from lim_kernels.prefix_groups import PrefixGroups

TOTALS = (
    *("decode_steps", "tokens_attended", "tokens_dense", "selections", "requests", "requests_sparse"),
    *("tokens_shared", "rows_grouped", "warm_starts"),
)
_IMPLEMENTATIONS = ("reference", "triton")


@dataclass(frozen=True)
class Ledger:
    """What accounting remembers; all on one device, all written by `count_step`."""

    totals: Tensor  # int64 [9], by TOTALS
    seen: Tensor  # int64 [R], generation of the tenant that decoded last on each row of the request pool; -1 is none
    sparse: Tensor  # uint8 [R], whether that tenant outgrew the budget


def count_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    num_layers: int,
    sparse_layers: int,
    selection_layers: int,
    acts: Tensor | None = None,
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
        acts: uint8 [B], bits of `lim_kernels.acts`. None: all rows longer than the budget select.
        early_layers: layers in which rows with EARLY attend to a set.
        groups: the batch's prefix groups, if any layers use them; grouped_layers: how many do.
        set_groups, set_counts: as `groups_of_sets` gives them, where sparse layers read the tokens of groups once.
            None: they do not, and sets have as many tokens as the budget allows.

    Raises:
        ValueError: wrong shape, or an unknown implementation.
    """
    op = "count_step"
    require(rows.dim() == 1 and rows.shape == seq_lens.shape, op, "rows and seq_lens [B]", list(rows.shape))
    require(generations.shape == ledger.seen.shape, op, f"generations {list(ledger.seen.shape)}", generations.shape)
    require_rows(op, rows, generations, seq_lens, acts)
    require(acts is None or acts.shape == rows.shape, op, f"acts {list(rows.shape)}", acts is not None and acts.shape)
    given = [part is not None for part in (set_groups, set_counts)]
    require(given in ([False] * 2, [groups is not None] * 2), op, "set_groups and set_counts beside groups", given)
    require(set_counts is None or set_counts.shape == rows.shape, op, f"set_counts {list(rows.shape)}", set_counts)
    require_rows(op, set_counts)
    if resolve(op, implementation, _IMPLEMENTATIONS, default_for(rows)) == "reference":
        count = reference.count_step
    else:
        from lim_kernels.count_step.triton import count_step as count
    count(
        ledger.totals,
        ledger.seen,
        ledger.sparse,
        rows,
        generations,
        seq_lens,
        budget=budget,
        num_layers=num_layers,
        sparse_layers=sparse_layers,
        selection_layers=selection_layers,
        acts=acts,
        early_layers=early_layers,
        followed=None if groups is None else groups.followed,
        paths=None if groups is None else groups.paths,
        grouped_layers=grouped_layers,
        set_followed=None if set_groups is None else set_groups.followed,
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
    """Correct `tokens_attended` where sets have fewer tokens than `count_step` took them to have.

    Args:
        rows, seq_lens, budget: of the step, as `count_step` had them.
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
    if resolve(op, implementation, _IMPLEMENTATIONS, default_for(rows)) == "reference":
        count = reference.count_sets
    else:
        from lim_kernels.count_step.triton import count_sets as count
    count(ledger.totals, rows, seq_lens, set_counts, budget=budget, layers=layers)
