"""Specification of step accounting in plain torch, without a host synchronisation; also what a CPU server runs.

for each row of the batch that does not pad it, of length n:
    a row is sparse if n > budget
    layers that attend to a set read min(n, budget) tokens (or as many as its set has), all others read n
    a sparse row selects in this step unless its action says that it keeps the set it has, and then the selection
        layers read a set too; likewise the layers before them with EARLY
    requests        += 1 if its tenant decodes for the first time
    requests_sparse += 1 if its tenant is sparse for the first time
    tokens_shared   += tokens that a row before it reads for it, in the layers that read a group's tokens once
    rows_grouped    += 1 if it is in a group
    warm_starts     += 1 if it is sparse and begins with a recalled set
remember of each row its tenant, and whether that has been sparse
"""

import torch
from torch import Tensor

from lim_kernels.count_decode_step.ledger import TOTALS, Ledger
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.row_actions import EARLY, RECALL, SELECT


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
    actions: Tensor | None,
    early_layers: int,
    groups: PrefixGroups | None,
    grouped_layers: int,
    set_groups: PrefixGroups | None,
    set_counts: Tensor | None,
) -> None:
    """See `api.count_decode_step`."""
    rows = rows.long()
    real = rows != 0
    lens = seq_lens.to(torch.int64) * real
    # Where sets outlive a step, selection layers may be sparse too.
    sparse = (lens > budget) if sparse_layers or actions is not None else torch.zeros_like(real)
    current = generations[rows]
    new = (ledger.seen[rows] != current) & real
    before = (ledger.sparse[rows] != 0) & ~new
    selecting, early, recalling = _acting(sparse, actions)
    sets = lens.clamp(max=budget) if set_counts is None else set_counts * real
    saved = ((sparse & ~selecting) * selection_layers + early * early_layers) * (lens - budget)
    zero = ledger.totals.new_zeros(())
    amounts = {
        "decode_steps": real.any().to(torch.int64),
        "tokens_attended": ((num_layers - sparse_layers) * lens + sparse_layers * sets).sum() - saved.sum(),
        "tokens_dense": num_layers * lens.sum(),
        "selections": selection_layers * selecting.sum(),
        "requests": new.sum(),
        "requests_sparse": (sparse & ~before).sum(),
        "tokens_shared": _read_once(groups, grouped_layers, zero) + _read_once(set_groups, sparse_layers, zero),
        "rows_grouped": zero if groups is None else (groups.innermost >= 0).sum(),
        "warm_starts": recalling.sum(),
    }
    ledger.totals.add_(torch.stack([amounts[name] for name in TOTALS]))
    ledger.seen[rows] = torch.where(real, current, ledger.seen[rows])
    ledger.sparse[rows] = (before | sparse).to(ledger.sparse.dtype)


def _acting(sparse: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """bool [B] each: sparse rows that select, that attend to their set early, and that recall it."""
    if actions is None:
        none = torch.zeros_like(sparse)
        return sparse, none, none
    selecting, early, recalling = (sparse & ((actions & bit) != 0) for bit in (SELECT, EARLY, RECALL))
    return selecting, early, recalling


def _read_once(groups: PrefixGroups | None, layers: int, zero: Tensor) -> Tensor:
    """int64, tokens that rows need not read in so many layers, because one before them does."""
    return zero if groups is None else layers * groups.already_read.sum(dtype=torch.int64)


def count_sets(ledger: Ledger, rows: Tensor, seq_lens: Tensor, set_counts: Tensor, *, budget: int, layers: int) -> None:
    """See `api.count_sets`."""
    # [B, H_kv]
    counts = set_counts.view(len(rows), -1)
    more = (counts - seq_lens.clamp(max=budget).unsqueeze(1)).to(torch.int64) * (rows != 0).unsqueeze(1)
    attended = ledger.totals[TOTALS.index("tokens_attended")]
    attended += (layers * more.sum()).div(counts.shape[1], rounding_mode="floor")
