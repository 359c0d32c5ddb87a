"""Adaptive budgets in Triton: one pass over the scores, spread over the whole context, and one program a row.

The pass counts a row's tokens by bin. The row's program then weighs bins, which are few, and the tokens of sinks and
window, which are no more than the budget; what these hold is taken out of the bins to leave the candidates'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.adaptive_budget import masses
from lim_kernels.operands import SetSizes
from lim_kernels.triton_support import programs_along, readable_width

_BINS = tl.constexpr(masses.BINS)
_TOP_SCORE = tl.constexpr(masses.TOP_SCORE)
_BINS_PER_E = tl.constexpr(masses.BINS_PER_E)
_STEPS = tl.constexpr(masses.STEPS)
_ONE = tl.constexpr(1 << masses.ONE_BITS)
_FACTOR_BITS = tl.constexpr(masses.FACTOR_BITS)
_SHARE_BITS = tl.constexpr(masses.SHARE_BITS)
_SHARE_LOW = tl.constexpr((1 << masses.SHARE_BITS) - 1)
_WINDOWS = tl.constexpr(masses.WINDOWS)
_COPIES = 4
_BLOCK = 2048
_CHUNK = 512


@triton.jit
def weight_bin(scores):
    """Bin of a score, the heaviest first; one that is no number counts as no weight."""
    steps = (_TOP_SCORE - scores) * _BINS_PER_E
    steps = tl.where(steps < _BINS - 1.0, steps, _BINS - 1.0)
    return tl.maximum(steps, 0.0).to(tl.int32)


@triton.jit
def weights_of(bins, FACTORS: tl.constexpr):
    """int64: what a token weighs that is so many bins below the heaviest."""
    weights = tl.full(bins.shape, _ONE, dtype=tl.int64)
    for power in tl.static_range(_STEPS):
        weights = tl.where((bins >> power) & 1 == 1, (weights * FACTORS[power]) >> _FACTOR_BITS, weights)
    return weights >> tl.minimum(tl.maximum(bins >> _STEPS, 0), 62).to(tl.int64)


@triton.jit
def weigh_tokens(scores_row, first, start, end, FACTORS: tl.constexpr, CHUNK: tl.constexpr):
    """What the tokens of positions start … end - 1 weigh, and how many of them each bin has."""
    weight = tl.full([], 0, dtype=tl.int64)
    counts = tl.zeros([_BINS], dtype=tl.int32)
    for place in range(start, end, CHUNK):
        positions = place + tl.arange(0, CHUNK)
        inside = positions < end
        bins = weight_bin(tl.load(scores_row + positions, mask=inside, other=0.0))
        weight += tl.sum(tl.where(inside, weights_of(bins - first, FACTORS), 0), axis=0)
        counts += tl.histogram(bins, _BINS, mask=inside)
    return weight, counts


@triton.jit
def find_window(scores_row, first, mass, length, budget, FACTORS: tl.constexpr, CHUNK: tl.constexpr):
    """The longest window whose tokens weigh as many sixteenths of the row as it has of the budget."""
    parts = 1 + tl.arange(0, _WINDOWS)
    windows = tl.maximum((budget * parts) // 16, 1)
    held = tl.zeros([_WINDOWS], dtype=tl.int64)
    for place in range(length - tl.max(windows, axis=0), length, CHUNK):
        positions = place + tl.arange(0, CHUNK)
        weights = weights_of(
            weight_bin(tl.load(scores_row + positions, mask=positions < length, other=0.0)) - first, FACTORS
        )
        # [WINDOWS, CHUNK]
        inside = (positions[None, :] >= length - windows[:, None]) & (positions < length)[None, :]
        held += tl.sum(tl.where(inside, weights[None, :], 0), axis=1)
    enough = held >= (mass >> 4) * parts
    return tl.max(tl.where(enough | (parts == 1), windows, 0), axis=0)


@triton.jit
def count_kernel(
    scores_ptr, lens_ptr, counts_ptr, stride_scores, width, budget, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Count a row's tokens by bin, block by block."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        return
    for block in range(tl.program_id(0), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        bins = weight_bin(tl.load(scores_ptr + row * stride_scores + positions, mask=positions < width, other=0.0))
        # Copies, so that tokens do not queue for one bin.
        copies = (row * COPIES + positions % COPIES) * _BINS
        tl.atomic_add(counts_ptr + copies + bins, 1, mask=positions < length, sem="relaxed")


@triton.jit(do_not_specialize=["budget", "recent", "sinks", "share", "floor"])
def size_kernel(
    scores_ptr,
    lens_ptr,
    counts_ptr,
    budgets_ptr,
    recents_ptr,
    stride_scores,
    budget,
    recent,
    sinks,
    share,
    floor,
    FACTORS: tl.constexpr,
    COPIES: tl.constexpr,
    CHUNK: tl.constexpr,
    FIND_RECENT: tl.constexpr,
    FIND_BUDGET: tl.constexpr,
):
    """Find a row's window, of `recent` tokens at least with FIND_RECENT and as many without, and its budget."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        tl.store(budgets_ptr + row, length)
        tl.store(recents_ptr + row, recent)
        return
    scores_row = scores_ptr + row * stride_scores
    bins = tl.arange(0, _BINS)
    counts = tl.zeros([_BINS], dtype=tl.int32)
    for copy in tl.static_range(COPIES):
        counts += tl.load(counts_ptr + (row * COPIES + copy) * _BINS + bins)
    first = tl.min(tl.where(counts > 0, bins, _BINS), axis=0)
    weights = weights_of(bins - first, FACTORS)
    mass = tl.sum(counts * weights, axis=0)
    if FIND_RECENT:
        recent = tl.maximum(recent, find_window(scores_row, first, mass, length, budget, FACTORS, CHUNK))
    size = budget
    if FIND_BUDGET:
        of_sinks, sink_counts = weigh_tokens(scores_row, first, 0, sinks, FACTORS, CHUNK)
        of_window, window_counts = weigh_tokens(scores_row, first, length - recent, length, FACTORS, CHUNK)
        low = mass & _SHARE_LOW
        wanted = (mass >> _SHARE_BITS) * share + ((low * share) >> _SHARE_BITS) - of_sinks - of_window
        counts -= sink_counts + window_counts
        weighed = counts * weights
        short = tl.cumsum(weighed, axis=0) < wanted
        # Whole bins that do not suffice, and so many tokens of the next that do.
        whole = tl.sum(tl.where(short, counts, 0), axis=0)
        lacking = tl.maximum(wanted - tl.sum(tl.where(short, weighed, 0), axis=0), 0)
        weight = tl.maximum(tl.max(tl.where(short | (counts == 0), 0, weights), axis=0), 1)
        least = tl.maximum(recent + sinks + 1, floor)
        size = recent + sinks + whole + (lacking + weight - 1) // weight
        size = tl.minimum(tl.maximum(size, least), budget).to(tl.int32)
    tl.store(budgets_ptr + row, size)
    tl.store(recents_ptr + row, recent)


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
    batch, length = scores.shape
    budgets, recents = (torch.empty(batch, dtype=torch.int32, device=scores.device) for _ in range(2))
    counts = torch.zeros(batch, _COPIES, masses.BINS, dtype=torch.int32, device=scores.device)
    common = {
        "scores_ptr": scores,
        "lens_ptr": seq_lens,
        "counts_ptr": counts,
        "stride_scores": scores.stride(0),
        "budget": sizes.budget,
        "COPIES": _COPIES,
    }
    if length > sizes.budget:
        count_kernel[(programs_along(triton.cdiv(length, _BLOCK), batch, scores.device), batch)](
            width=readable_width(scores), BLOCK=_BLOCK, num_warps=8, **common
        )
    size_kernel[(batch,)](
        budgets_ptr=budgets,
        recents_ptr=recents,
        recent=masses.least_window(sizes.budget) if find_recent else sizes.recent,
        sinks=sizes.sinks,
        share=0 if share is None else share,
        floor=floor,
        FACTORS=masses.FACTORS,
        CHUNK=_CHUNK,
        FIND_RECENT=find_recent,
        FIND_BUDGET=share is not None,
        num_warps=8,
        **common,
    )
    return budgets, recents
