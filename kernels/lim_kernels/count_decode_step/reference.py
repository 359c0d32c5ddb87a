"""Specification of step accounting in plain torch, without a host synchronisation; also what a CPU server runs.

add to the totals what the step before the last one left pending
for each row of the batch that does not pad it, of length n:
    a row is sparse if n > budget
    layers that attend to a set read min(n, budget) tokens (or as many as its set has), all others read n
    a sparse row selects in this step unless its action says that it keeps the set it has, and then the selection
        layers read a set too; likewise the layers before them with EARLY
    where a sparse row selects, scoring layers attend to its set as well, and
    tokens_scored   += n for each of them, of which they read the keys
    requests        += 1 if its tenant decodes for the first time
    requests_sparse += 1 if its tenant is sparse for the first time
    tokens_shared   += tokens that a row before it reads for it, in the layers that read a group's tokens once
    rows_grouped    += 1 if it is in a group
    warm_starts     += 1 if it is sparse and begins with a recalled set
leave the sum over rows pending, and remember of each row what it added and when, its tenant, and whether that has been
    sparse
"""

import torch
from torch import Tensor

from lim_kernels.count_decode_step.ledger import TOTALS, Layers, Ledger, Sharing
from lim_kernels.prefix_groups import PrefixGroups
from lim_kernels.row_actions import EARLY, RECALL, SELECT


def count_decode_step(
    ledger: Ledger,
    rows: Tensor,
    generations: Tensor,
    seq_lens: Tensor,
    layers: Layers,
    *,
    budget: int,
    actions: Tensor | None,
    sharing: Sharing | None,
) -> None:
    """See `api.count_decode_step`."""
    rows = rows.long()
    real = rows != 0
    lens = seq_lens.to(torch.int64) * real
    # Where sets outlive a step or are scored for, selection layers may be sparse too.
    may_be = bool(layers.sparse or layers.scoring) or actions is not None
    sparse = (lens > budget) if may_be else torch.zeros_like(real)
    new = (ledger.seen[rows] != generations[rows]) & real
    before = (ledger.sparse[rows] != 0) & ~new
    amounts = {
        "draft_tokens_attended": torch.zeros_like(real),
        "decode_steps": real,
        "tokens_dense": layers.all * lens,
        "requests": new,
        "requests_sparse": sparse & ~before,
        **_reads(lens, sparse, layers, budget, actions, None if sharing is None else sharing.set_counts),
        **_shared(real, layers, sharing),
    }
    # [B, len(TOTALS)]
    by_row = torch.stack([amounts[name].to(torch.int64) for name in TOTALS], dim=1)
    ledger.enter(rows, by_row)
    ledger.seen[rows] = torch.where(real, generations[rows], ledger.seen[rows])
    ledger.sparse[rows] = (before | sparse).to(ledger.sparse.dtype)


def _reads(
    lens: Tensor, sparse: Tensor, layers: Layers, budget: int, actions: Tensor | None, set_counts: Tensor | None
) -> dict[str, Tensor]:
    """What rows read and choose, [B] each."""
    selecting, early, recalling = _acting(sparse, actions)
    sets = lens.clamp(max=budget) if set_counts is None else set_counts * (lens > 0)
    saved = ((sparse & ~selecting) * layers.selecting + early * layers.early) * (lens - budget)
    saved += selecting * layers.scoring * (lens - sets)
    return {
        "tokens_attended": (layers.all - layers.sparse) * lens + layers.sparse * sets - saved,
        "tokens_scored": selecting * layers.scoring * lens,
        "selections": layers.selecting * selecting,
        "warm_starts": recalling,
    }


def _acting(sparse: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """bool [B] each: sparse rows that select, that attend to their set early, and that recall it."""
    if actions is None:
        none = torch.zeros_like(sparse)
        return sparse, none, none
    selecting, early, recalling = (sparse & ((actions & bit) != 0) for bit in (SELECT, EARLY, RECALL))
    return selecting, early, recalling


def _shared(real: Tensor, layers: Layers, sharing: Sharing | None) -> dict[str, Tensor]:
    """What rows need not read because one before them does, [B] each."""
    if sharing is None:
        return dict.fromkeys(("tokens_shared", "rows_grouped"), torch.zeros_like(real))
    shared = sharing.layers * _read_before(sharing.groups)
    if sharing.in_sets is not None:
        shared = shared + (layers.sparse + layers.scoring) * _read_before(sharing.in_sets)
    return {"tokens_shared": shared * real, "rows_grouped": (sharing.groups.innermost >= 0) & real}


def _read_before(groups: PrefixGroups) -> Tensor:
    return groups.already_read.to(torch.int64)


def count_sets(ledger: Ledger, rows: Tensor, seq_lens: Tensor, set_counts: Tensor, *, budget: int, layers: int) -> None:
    """See `api.count_sets`."""
    rows = rows.long()
    # [B, H_kv]
    counts = set_counts.view(len(rows), -1)
    more = (counts - seq_lens.clamp(max=budget).unsqueeze(1)).to(torch.int64) * (rows != 0).unsqueeze(1)
    # [B]
    more = (layers * more.sum(1)).div(counts.shape[1], rounding_mode="floor")
    attended = TOTALS.index("tokens_attended")
    ledger.amounts[:, attended].index_add_(0, rows, more)
    ledger.pending[:, attended].index_add_(0, (ledger.steps - 1) % 2, more.sum().unsqueeze(0))
