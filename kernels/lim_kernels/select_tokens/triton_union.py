"""The rank-major union in Triton: each head's best candidates are listed, ordered, and keep their best place.

A list as deep as the middle budget is rarely needed: where heads differ, a quarter of it already holds enough tokens,
and every place up to its depth is then exact. So lists are shallow first: a sample of the row tells about how large a
listed logit must be, one pass over the context lists them, and a sort within a warp gives their ranks. Heads for which
the guess missed are searched again, and rows whose lists agree so much that they hold fewer tokens than the middle get
deep lists. Both are launched always and end at once where they are not needed, because nobody asks the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.places import MAX_UNION, rank_unit, shallow_depth
from lim_kernels.select_tokens.triton_lists import gather_kernel, guess_kernel, search_kernel, to_key
from lim_kernels.triton_support import padded_empty, programs_along, readable_width

_SAMPLES = (2048, 8192)  # for the first guess, and where it missed
READ = 4096
_FILLED = 1024
_COUNTED = 2048


@triton.jit
def order_kernel(
    logits_ptr,
    lens_ptr,
    scratch_ptr,
    reached_ptr,
    scores_ptr,
    listed_ptr,
    budget,
    recent,
    sinks,
    depth,
    first_head,
    num_heads,
    unit,
    stride_row,
    stride_head,
    stride_scores,
    HEADS: tl.constexpr,
    TOP: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Order one head's list, and let each of its `depth` best tokens keep the best place it has in any list.

    `listed` counts the tokens of a row that have a place. Few warps: a sort within one needs no shared memory.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(lens_ptr + row).to(tl.int32) <= budget:
        return
    if DEEP and tl.load(listed_ptr + row) >= budget - recent - sinks:
        return
    place = row * HEADS + head
    reached = tl.load(reached_ptr + place)
    ranks = tl.arange(0, TOP)
    listed = ranks < reached
    positions = tl.load(scratch_ptr + place * TOP + ranks, mask=listed, other=0)
    logits = tl.load(logits_ptr + row * stride_row + head * stride_head + positions, mask=listed, other=0.0)
    logits = tl.where(logits == logits, logits, -float("inf"))
    # By logit, then by lower position.
    entries = (to_key(logits).to(tl.int64) << 32) + (0x7FFFFFFF - positions).to(tl.int64)
    entries = tl.sort(tl.where(listed, entries, -9223372036854775808), descending=True)
    positions = 0x7FFFFFFF - (entries & 0xFFFFFFFF)
    order = -(ranks * num_heads + first_head + head.to(tl.int32)).to(tl.float32) * unit
    before = tl.atomic_max(scores_ptr + row * stride_scores + positions, order, mask=ranks < depth, sem="relaxed")
    if not DEEP:
        new = (ranks < depth) & (before == -float("inf"))
        tl.atomic_add(listed_ptr + row, tl.sum(new.to(tl.int32), axis=0), sem="relaxed")


@triton.jit
def count_listed_kernel(
    scores_ptr, lens_ptr, listed_ptr, width, budget, recent, sinks, stride_scores, BLOCK: tl.constexpr
):
    """Count a row's candidates that have a place, block by block."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    if length <= budget:
        return
    last = length - recent
    for block in range(tl.program_id(0), tl.cdiv(last, BLOCK), tl.num_programs(0)):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + row * stride_scores + positions, mask=positions < width, other=0.0)
        there = (positions >= sinks) & (positions < last) & (scores > -float("inf"))
        tl.atomic_add(listed_ptr + row, tl.sum(there.to(tl.int32), axis=0), sem="relaxed")


def union_scores(
    logits: Tensor, seq_lens: Tensor, sizes: SetSizes, *, first_head: int, num_heads: int, shallow: bool
) -> Tensor:
    """`api.score_tokens` for "union"."""
    batch, heads, length = logits.shape
    middle = sizes.middle
    scores = padded_empty(batch, length, device=logits.device)
    if middle == 0 or length <= sizes.budget:
        return scores.fill_(float("-inf"))
    depth = shallow_depth(middle)
    # Room for more than needed, so that few guesses miss.
    top = max(16, triton.next_power_of_2(2 * depth))
    listed, reached = _counters(batch, heads, logits.device)
    shared = _shared(logits, seq_lens, sizes, reached)
    width = readable_width(logits)
    scratch = torch.empty(batch, heads, top, dtype=torch.int32, device=logits.device)
    guesses = torch.empty(batch * heads, dtype=torch.float32, device=logits.device)
    pending = torch.empty(batch * heads, dtype=torch.int32, device=logits.device)
    programs = programs_along(triton.cdiv(length, READ), batch * heads, logits.device)
    for again in (False, True):
        attempt = {"guesses_ptr": guesses, "pending_ptr": pending, "TOP": top, "AGAIN": again}
        guess_kernel[(heads, batch)](
            scores_ptr=scores,
            depth=depth,
            stride_scores=scores.stride(0),
            SAMPLE=_SAMPLES[again],
            BLOCK=_FILLED,
            num_warps=8 if again else 4,
            **attempt,
            **shared,
        )
        gather_kernel[(programs, heads, batch)](
            scratch_ptr=scratch, width=width, BLOCK=READ, num_warps=8, **attempt, **shared
        )
    places = {"first_head": first_head, "num_heads": num_heads, "unit": rank_unit(middle, num_heads)}
    _order_lists(scores, scratch, listed, shared, places, width=width, depth=depth, deep=False)
    if depth < middle and not shallow:
        _deepen(scores, listed, shared, places, width=width, middle=middle)
    return scores


def deepen_scores(
    scores: Tensor, logits: Tensor, seq_lens: Tensor, sizes: SetSizes, *, first_head: int, num_heads: int
) -> None:
    """See `api.deepen_scores`."""
    batch, heads, length = logits.shape
    middle = sizes.middle
    if middle == 0 or length <= sizes.budget or shallow_depth(middle) == middle:
        return
    listed, reached = _counters(batch, heads, logits.device)
    shared = _shared(logits, seq_lens, sizes, reached)
    count_listed_kernel[(programs_along(triton.cdiv(length, _COUNTED), batch, logits.device), batch)](
        scores_ptr=scores,
        lens_ptr=seq_lens,
        listed_ptr=listed,
        width=readable_width(scores),
        budget=sizes.budget,
        recent=sizes.recent,
        sinks=sizes.sinks,
        stride_scores=scores.stride(0),
        BLOCK=_COUNTED,
        num_warps=4,
    )
    places = {"first_head": first_head, "num_heads": num_heads, "unit": rank_unit(middle, num_heads)}
    _deepen(scores, listed, shared, places, width=readable_width(logits), middle=middle)


def _counters(batch: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros int32 [B] and [B * H], cleared together; both start at multiples of 16 bytes."""
    start = -(-batch // 4) * 4
    counters = torch.zeros(start + batch * heads, dtype=torch.int32, device=device)
    return counters[:batch], counters[start:]


def _shared(logits: Tensor, seq_lens: Tensor, sizes: SetSizes, reached: Tensor) -> dict[str, Any]:
    """Arguments of every kernel of lists."""
    return {
        "logits_ptr": logits,
        "lens_ptr": seq_lens,
        "reached_ptr": reached,
        "budget": sizes.budget,
        "recent": sizes.recent,
        "sinks": sizes.sinks,
        "stride_row": logits.stride(0),
        "stride_head": logits.stride(1),
        "HEADS": logits.shape[1],
    }


def _deepen(
    scores: Tensor, listed: Tensor, shared: dict[str, Any], places: dict[str, Any], *, width: int, middle: int
) -> None:
    """Let rows in which fewer than `middle` tokens are listed have lists of that depth."""
    # These are too long for much more room than needed.
    top = max(16, triton.next_power_of_2(min(middle + middle // 3, max(middle, MAX_UNION))))
    scratch = torch.empty(len(listed), shared["HEADS"], top, dtype=torch.int32, device=scores.device)
    _order_lists(scores, scratch, listed, shared, places, width=width, depth=middle, deep=True)


def _order_lists(
    scores: Tensor,
    scratch: Tensor,
    listed: Tensor,
    shared: dict[str, Any],
    places: dict[str, Any],
    *,
    width: int,
    depth: int,
    deep: bool,
) -> None:
    """Search the lists that are not there yet, order all of them, and write places."""
    batch, heads, top = scratch.shape
    lists = {"scratch_ptr": scratch, "listed_ptr": listed, "depth": depth, "TOP": top, "DEEP": deep, **shared}
    search_kernel[(heads, batch)](width=width, SAMPLE=_SAMPLES[True], BLOCK=READ, num_warps=8, **lists)
    order_kernel[(heads, batch)](
        scores_ptr=scores, stride_scores=scores.stride(0), num_warps=4 if top <= 2048 else 8, **lists, **places
    )
