"""Specification of step accounting in plain torch, without a host synchronisation."""

import torch
from torch import Tensor

from lim_kernels.acts import EARLY, RECALL, SELECT


def count_step(
    totals: Tensor,
    seen: Tensor,
    sparse_rows: Tensor,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    num_layers: int,
    sparse_layers: int,
    selection_layers: int,
    acts: Tensor | None,
    early_layers: int,
    followed: Tensor | None,
    paths: Tensor | None,
    grouped_layers: int,
    set_followed: Tensor | None,
    set_counts: Tensor | None,
) -> None:
    """See `api.count_step`."""
    rows = rows.long()
    real = rows != 0
    lens = seq_lens.to(torch.int64) * real
    # Where sets outlive a step, selection layers may be sparse too.
    sparse = (lens > budget) if sparse_layers or acts is not None else torch.zeros_like(real)
    current = generations[rows]
    new = (seen[rows] != current) & real
    before = (sparse_rows[rows] != 0) & ~new
    selecting = sparse if acts is None else sparse & ((acts & SELECT) != 0)
    kept = sparse & ~selecting
    early = torch.zeros_like(real) if acts is None else sparse & ((acts & EARLY) != 0)
    full_layers = num_layers - sparse_layers
    sets = lens.clamp(max=budget) if set_counts is None else set_counts * real
    zero = totals.new_zeros(())
    totals += torch.stack(
        [
            real.any().to(torch.int64),
            (full_layers * lens + sparse_layers * sets).sum()
            - ((kept * selection_layers + early * early_layers) * (lens - budget)).sum(),
            num_layers * lens.sum(),
            selection_layers * selecting.sum(),
            new.sum(),
            (sparse & ~before).sum(),
            (zero if followed is None else grouped_layers * followed.sum(dtype=torch.int64))
            + (zero if set_followed is None else sparse_layers * set_followed.sum(dtype=torch.int64)),
            zero if paths is None else (paths >= 0).sum(),
            zero if acts is None else (sparse & ((acts & RECALL) != 0)).sum(),
        ]
    )
    seen[rows] = torch.where(real, current, seen[rows])
    sparse_rows[rows] = (before | sparse).to(sparse_rows.dtype)


def count_sets(totals: Tensor, rows: Tensor, seq_lens: Tensor, set_counts: Tensor, *, budget: int, layers: int) -> None:
    """See `api.count_sets`."""
    # [B, H_kv]
    counts = set_counts.view(len(rows), -1)
    more = (counts - seq_lens.clamp(max=budget).unsqueeze(1)).to(torch.int64) * (rows != 0).unsqueeze(1)
    totals[1] += (layers * more.sum()).div(counts.shape[1], rounding_mode="floor")
