"""Specification of adaptive budgets in plain torch, without a host synchronisation; also what a CPU server runs.

For one row of n tokens, longer than the budget K (`masses` says why weights are integers):

    bin(t)    = sixteenths of an octave by which the weight of token t is below the heaviest that has a bin
    weight(t) = 2**40 * 2**-((bin(t) - smallest bin in the row) / 16), in integers as `weights_of` rounds them
    mass      = sum of weight(t) over the row

    recent = sizes.recent, or with find_recent the longest of
             least_window(K), and K * part / 16 for part in 1 … 8, if its tokens weigh mass * part / 16 at least

    budget = K, or with a share:
        wanted = mass * share - weight of the sinks and the window
        taken  = how many candidates, heaviest bin first, until they weigh `wanted`
        budget = sinks + recent + taken, at least `floor` and sinks + recent + 1, at most K

A row that is no longer than K gets its length.
"""

import torch
from torch import Tensor

from lim_kernels.adaptive_budget.masses import (
    BINS,
    BINS_PER_E,
    FACTOR_BITS,
    FACTORS,
    ONE_BITS,
    SHARE_BITS,
    STEPS,
    TOP_SCORE,
    WINDOWS,
    least_window,
    window_of,
)
from lim_kernels.operands import SetSizes


def adapt_budgets(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    find_recent: bool,
    share: int | None,
    floor: int,
) -> tuple[Tensor, Tensor]:
    """See `api.adapt_budgets`; `share` in units of 2**-SHARE_BITS."""
    budget, sinks, length = sizes.budget, sizes.sinks, scores.shape[1]
    lens = seq_lens.to(torch.int64)
    longer = lens > budget
    positions = torch.arange(length, device=scores.device)
    # [B, 1]
    ends = lens.unsqueeze(1)
    bins = bins_of(scores)
    counts = histogram(bins, positions < ends)
    # [B, 1], then [B, BINS]: the first bin that is not empty, and what a token of each weighs.
    first = (counts > 0).to(torch.int32).argmax(dim=1, keepdim=True)
    weights = weights_of(torch.arange(BINS, device=scores.device) - first)
    mass = (counts * weights).sum(dim=1)
    of_tokens = weights.gather(1, bins)

    if find_recent:
        recents = torch.full_like(lens, least_window(budget))
        for part in range(1, WINDOWS + 1):
            window = window_of(budget, part)
            held = of_tokens.masked_fill(~((positions >= ends - window) & (positions < ends)), 0).sum(dim=1)
            recents = torch.where(longer & (held >= (mass >> 4) * part), recents.clamp(min=window), recents)
    else:
        recents = torch.full_like(lens, sizes.recent)
    budgets = lens.clamp(max=budget)
    if share is not None:
        starts = ends - recents.unsqueeze(1)
        forced = (positions < ends) & ((positions < sinks) | (positions >= starts))
        wanted = share_of(mass, share) - of_tokens.masked_fill(~forced, 0).sum(dim=1)
        counts = counts - histogram(bins, forced)
        held = (counts * weights).cumsum(dim=1)
        # Whole bins that do not suffice, and so many tokens of the next that do.
        short = held < wanted.unsqueeze(1)
        whole = torch.where(short, counts, 0).sum(dim=1)
        lacking = wanted - torch.where(short, counts * weights, 0).sum(dim=1)
        weight = torch.where(short, 0, weights).masked_fill(counts == 0, 0).amax(dim=1).clamp(min=1)
        needed = recents + sinks + whole + (lacking.clamp(min=0) + weight - 1) // weight
        needed = torch.maximum(needed, (recents + sinks + 1).clamp(min=floor)).clamp(max=budget)
        budgets = torch.where(longer, needed, budgets)
    return budgets.to(torch.int32), recents.to(torch.int32)


def bins_of(scores: Tensor) -> Tensor:
    """int64 [B, L]: each score's bin; one that is no number counts as no weight."""
    steps = (TOP_SCORE - scores) * BINS_PER_E
    return torch.where(steps < BINS - 1, steps, BINS - 1).clamp(min=0).to(torch.int64)


def weights_of(bins: Tensor) -> Tensor:
    """int64: what a token weighs that is so many bins below the heaviest."""
    weights = torch.full_like(bins, 1 << ONE_BITS)
    for power, factor in enumerate(FACTORS):
        weights = torch.where((bins >> power) & 1 == 1, (weights * factor) >> FACTOR_BITS, weights)
    return weights >> (bins >> STEPS).clamp(0, 62)


def histogram(bins: Tensor, counted: Tensor) -> Tensor:
    """int64 [B, BINS]: how many of the counted tokens are in each bin."""
    return bins.new_zeros(bins.shape[0], BINS).scatter_add_(1, bins, counted.to(torch.int64).expand(bins.shape))


def share_of(mass: Tensor, share: int) -> Tensor:
    """floor(mass * share / 2**SHARE_BITS) for mass < 2**62, of which no part overflows."""
    low = mass & ((1 << SHARE_BITS) - 1)
    return (mass >> SHARE_BITS) * share + ((low * share) >> SHARE_BITS)
