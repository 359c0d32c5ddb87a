"""Token selection in Triton: `max` and `sum` in one pass over the logits; `union` and the choice in their own files."""

import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.dispatch import require
from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.places import MAX_UNION
from lim_kernels.select_tokens.triton_choose import choose_in_spans
from lim_kernels.select_tokens.triton_union import deepen_scores, union_scores
from lim_kernels.triton_support import padded_empty, programs_along, readable_width

__all__ = ["choose_tokens", "deepen_scores", "score_tokens"]

_BLOCK = 1024


@triton.jit
def aggregate_kernel(
    logits_ptr,
    lse_ptr,
    lens_ptr,
    scores_ptr,
    width,
    budget,
    stride_row,
    stride_head,
    stride_scores,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest log-weight, or logarithm of the sum of weights, over the heads of a row's tokens, block by block."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        return
    logits_row = logits_ptr + row * stride_row
    for block in range(tl.program_id(0), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        inside = positions < width
        best = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, HEADS, TILE):
            heads = first + tl.arange(0, TILE)
            lse = tl.load(lse_ptr + row * HEADS + heads, mask=heads < HEADS, other=float("inf"))
            # [TILE, BLOCK]
            logits = tl.load(
                logits_row + heads[:, None] * stride_head + positions[None, :],
                mask=(heads < HEADS)[:, None] & inside[None, :],
                other=0.0,
            )
            weights = logits - lse[:, None]
            peak = tl.maximum(best, tl.max(weights, axis=0))
            if SUM:
                # Weights relative to the heaviest head's: a sum of tiny ones is not zero.
                base = tl.where(peak == -float("inf"), 0.0, peak)
                total = total * tl.exp(best - base) + tl.sum(tl.exp(weights - base[None, :]), axis=0)
            best = peak
        scores = best + tl.log(total) if SUM else best
        tl.store(scores_ptr + row * stride_scores + positions, scores, mask=inside)


def score_tokens(
    logits: Tensor,
    lse: Tensor | None,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    aggregate: str,
    first_head: int,
    num_heads: int,
    shallow: bool,
) -> Tensor:
    """See `api.score_tokens`."""
    batch, heads, length = logits.shape
    if aggregate != "union":
        scores = padded_empty(batch, length, device=logits.device)
        programs = programs_along(triton.cdiv(length, _BLOCK), batch, logits.device)
        aggregate_kernel[(programs, batch)](
            logits_ptr=logits,
            lse_ptr=lse,
            lens_ptr=seq_lens,
            scores_ptr=scores,
            width=min(readable_width(logits), readable_width(scores)),
            budget=sizes.budget,
            stride_row=logits.stride(0),
            stride_head=logits.stride(1),
            stride_scores=scores.stride(0),
            HEADS=heads,
            TILE=min(8, triton.next_power_of_2(heads)),
            SUM=aggregate == "sum",
            BLOCK=_BLOCK,
            num_warps=4,
        )
        return scores
    fits = sizes.middle <= MAX_UNION
    require(fits, "score_tokens", f"a middle budget of at most {MAX_UNION} for union", sizes.middle)
    return union_scores(logits, seq_lens, sizes, first_head=first_head, num_heads=num_heads, shallow=shallow)


def choose_tokens(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    slots: Tensor | None,
    budgets: Tensor | None,
    recents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.choose_tokens`."""
    return choose_in_spans(scores, seq_lens, sizes, slots=slots, budgets=budgets, recents=recents)
