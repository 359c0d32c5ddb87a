"""Public entry of page bounds: validates operands and dispatches.

Who writes keys calls `bound_pages`. A decode step calls `score_pages`, and has its sets by `choose_pages` and
`expand_pages`. None of them waits for the device.
"""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_one_device, require_rows
from lim_kernels.page_bounds import reference
from lim_kernels.page_bounds.state import PageBounds


def bound_pages(bounds: PageBounds, k_cache: Tensor, written: Tensor, *, implementation: str | None = None) -> None:
    """Bring the bounds of the pages of `written` up to date.

    Args:
        bounds: written.
        k_cache: [num_slots, H_kv, D], floating, fp8 included.
        written: int32 or int64 [N], the slots just written, in the order of their requests' tokens: of each page one
            run of consecutive slots. Each is below 16 times the pages of `bounds`. The page's bounds are those of all
            keys from its first slot to the run's last, whoever wrote those before the run. Slot 0, where padding is
            written, may come any number of times.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "bound_pages"
    _check_bounds(op, bounds)
    fits = k_cache.dim() == 3 and k_cache.shape[1:] == bounds.lows.shape[1:] and k_cache.is_floating_point()
    expected = "k_cache floating [num_slots, {}, {}]".format(*bounds.lows.shape[1:])
    require(fits, op, expected, f"{k_cache.dtype} {list(k_cache.shape)}")
    _check_integers(op, "written", written)
    require_one_device(op, bounds.lows, bounds.highs, k_cache, written)
    require_rows(op, k_cache, written)
    bound = implementation_of(reference.bound_pages, implementation, k_cache)
    bound(bounds, k_cache, written)


def score_pages(
    q: Tensor,
    bounds: PageBounds,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    score_beyond: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """How large q·k can be in each page: for each KV head the largest bound over its query heads.

    A query head's bound is the sum over D of max(q · low, q · high). Ranks depend on neither scale nor logit cap.

    Args:
        q: [B, H, D], floating; H is a multiple of H_kv.
        bounds: as `bound_pages` left them.
        slots: int32 [B, L], KV slot of each position; positions 16 p … 16 p + 15 are the slots of one page.
        seq_lens: int32 or int64 [B].
        score_beyond: rows no longer than this are not scored.

    Returns:
        float32 [B, H_kv, ceil(L / 16)], undefined beyond a row's last page and in rows that are not scored.

    Raises:
        ValueError: as `bound_pages`.
    """
    op = "score_pages"
    _check_bounds(op, bounds)
    _, kv_heads, dim = bounds.lows.shape
    fits = q.dim() == 3 and q.is_floating_point() and q.shape[2] == dim and q.shape[1] % kv_heads == 0
    require(fits, op, f"q floating [B, H, {dim}] with H a multiple of {kv_heads}", f"{q.dtype} {list(q.shape)}")
    _check_slots(op, slots, len(q))
    _check_integers(op, "seq_lens", seq_lens, len(q))
    require_one_device(op, bounds.lows, bounds.highs, q, slots, seq_lens)
    require_rows(op, q, slots, seq_lens)
    score = implementation_of(reference.score_pages, implementation, q)
    return score(q, bounds, slots, seq_lens, score_beyond=score_beyond)


def _check_bounds(op: str, bounds: PageBounds) -> None:
    lows, highs = bounds.lows, bounds.highs
    fits = lows.dim() == 3 and lows.shape == highs.shape and lows.dtype == highs.dtype and lows.itemsize > 1
    require(
        fits and lows.is_floating_point() and lows.is_contiguous() and highs.is_contiguous(),
        op,
        "contiguous lows and highs [pages, H_kv, D] of one floating dtype of at least 16 bits",
        f"{lows.dtype} {list(lows.shape)} and {highs.dtype} {list(highs.shape)}",
    )


def _check_slots(op: str, slots: Tensor, batch: int) -> None:
    fits = slots.dim() == 2 and slots.dtype == torch.int32 and len(slots) == batch
    require(fits, op, f"slots int32 [{batch}, L]", f"{slots.dtype} {list(slots.shape)}")


def _check_integers(op: str, name: str, tensor: Tensor, count: int | None = None) -> None:
    fits = tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 1 and count in (None, len(tensor))
    expected = f"{name} int32 or int64 [{'N' if count is None else count}]"
    require(fits, op, expected, f"{tensor.dtype} {list(tensor.shape)}")
