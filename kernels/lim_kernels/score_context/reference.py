"""Specification of scoring a context in plain torch: the logits of each group and of each row alone, then their lse.

It asks the host which rows and groups there are, which costs nothing on a CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lim_kernels.attention import as_one_row, as_rows, scaled_logits
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups


def score_context(
    q: Tensor,
    k_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scaling: Scaling,
    *,
    groups: PrefixGroups | None,
    score_beyond: int,
) -> tuple[Tensor, Tensor]:
    """See `api.score_context`; here logits that nobody asked for are -inf."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = torch.full((*q.shape[:2], slots.shape[1]), float("-inf"), dtype=compute, device=q.device)
    for rows, start, end in _parts(seq_lens.tolist(), groups, score_beyond):
        # One row's slots for all of them.
        keys_of = slots[rows[:1], start:end].long()
        found = scaled_logits(as_one_row(q[rows], k_cache.shape[1]), k_cache, keys_of, scaling)
        logits[rows, :, start:end] = as_rows(found.flatten(1, 2), len(rows), k_cache.shape[1])
    return logits.logsumexp(dim=2), logits


def _parts(lens: list[int], groups: PrefixGroups | None, score_beyond: int) -> Iterator[tuple[list[int], int, int]]:
    """Rows whose logits are wanted, and the places start … end - 1 that they read together."""
    starts = [0] * len(lens) if groups is None else groups.own_starts.tolist()
    for row, length in enumerate(lens):
        if length > max(score_beyond, starts[row]):
            yield [row], starts[row], length
    if groups is None:
        return
    for group, count in enumerate(groups.counts.tolist()):
        rows = [row for row in groups.members[group, :count].tolist() if lens[row] > score_beyond]
        if rows:
            yield rows, int(groups.starts[group]), int(groups.ends[group])
