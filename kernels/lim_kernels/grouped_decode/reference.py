"""Specification of grouped decode in plain torch: what each group and each row alone attend to, then merged.

It asks the host which groups there are, which costs nothing on a CPU.
"""

import torch
from torch import Tensor

from lim_kernels.attention import as_one_row, as_rows, attend
from lim_kernels.operands import Scaling
from lim_kernels.prefix_groups import PrefixGroups


def grouped_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    groups: PrefixGroups,
    scaling: Scaling,
    *,
    scored: bool,
    score_beyond: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `api.grouped_decode`; here every row gets its logits."""
    counts = groups.counts.tolist()
    found = [group for group, count in enumerate(counts) if count]
    if not found and not groups.own_starts.any():
        out, lse, all_logits = attend(q, k_cache, v_cache, slots, seq_lens, scaling)
        return out, lse, all_logits if scored else None

    own_starts = groups.own_starts.long()
    own_lens = seq_lens.long() - own_starts
    positions = own_starts.unsqueeze(1) + torch.arange(max(1, int(own_lens.max())), device=slots.device)
    own_slots = slots.gather(1, positions.clamp(max=slots.shape[1] - 1))
    # A set may be its group's alone.
    nothing = (own_lens == 0).unsqueeze(1)
    out, lse, own_logits = attend(q, k_cache, v_cache, own_slots, own_lens.clamp(min=1), scaling)
    out, lse = out.masked_fill(nothing.unsqueeze(2), 0.0), lse.masked_fill(nothing, float("-inf"))
    logits: Tensor | None = None
    if scored:
        logits = lse.new_full((*lse.shape, slots.shape[1] + 1), float("-inf"))
        # What lies beyond a row falls into a column that is cut off.
        places = torch.where(positions < seq_lens.unsqueeze(1), positions, slots.shape[1])
        logits.scatter_(2, places.unsqueeze(1).expand_as(own_logits), own_logits)
    # In the arithmetic's dtype until all parts are there.
    out = out.to(lse.dtype)
    for group in found:
        rows = groups.members[group, : counts[group]].long()
        start, end = int(groups.starts[group]), int(groups.ends[group])
        queries = as_one_row(q[rows], k_cache.shape[1])
        shared = slots[rows[:1], start:end]
        length = torch.full_like(seq_lens[:1], end - start)
        parts = attend(queries, k_cache, v_cache, shared, length, scaling)
        part, part_lse, part_logits = (as_rows(t, len(rows), k_cache.shape[1]) for t in parts)
        merged = torch.logaddexp(lse[rows], part_lse)
        out[rows] = out[rows] * (lse[rows] - merged).exp().unsqueeze(2) + part * (part_lse - merged).exp().unsqueeze(2)
        lse[rows] = merged
        if logits is not None:
            logits[rows, :, start:end] = part_logits
    return out.to(q.dtype), lse, None if logits is None else logits[..., :-1]
