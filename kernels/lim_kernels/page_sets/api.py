"""Public entry of sets of pages: validates operands and dispatches.

A row of n tokens has ceil(n / page) pages, the last of which need not be full. A layer that scored them calls
`choose_pages`, and has the slots of what was chosen by `expand_pages`. Neither waits for the device, and neither needs
anything that was computed of the lengths before.
"""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_one_device, require_rows
from lim_kernels.page_sets import reference


def choose_pages(
    scores: Tensor,
    seq_lens: Tensor,
    *,
    page: int,
    most: int,
    threshold: float | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The last page and the best-scored others of each row and KV head; equal scores go to the lower page.

    Args:
        scores: float32 [B, H_kv, P], larger is better; read for the pages before a row's last one, in rows of more than
            `most` pages.
        seq_lens: int32 or int64 [B], tokens of each row.
        page: tokens a page.
        most: pages in a set, at most. A row that has no more keeps all.
        threshold: of the pages before the last one, only those are chosen whose share of the softmax of the scores of
            all of them is larger than this; None: the best, whatever their share.

    Returns:
        pages int32 [B, H_kv, most], ascending, undefined behind their counts, and counts int32 [B, H_kv]. The last page
        of a row is always the last of its set.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "choose_pages"
    fits = scores.dim() == 3 and scores.dtype == torch.float32
    require(fits, op, "scores float32 [B, H_kv, P]", f"{scores.dtype} {list(scores.shape)}")
    require(scores.shape[2] < 1 << 22, op, "fewer than 4,194,304 pages", scores.shape[2])
    _check_lens(op, seq_lens, len(scores))
    require(page >= 1 and most >= 1, op, "page and most of 1 or more", f"page={page}, most={most}")
    require(threshold is None or 0 < threshold < 1, op, "a threshold between 0 and 1", threshold)
    require_one_device(op, scores, seq_lens)
    require_rows(op, scores, seq_lens)
    choose = implementation_of(reference.choose_pages, implementation, scores)
    return choose(scores, seq_lens, page=page, most=most, threshold=threshold)


def expand_pages(
    pages: Tensor, counts: Tensor, slots: Tensor, seq_lens: Tensor, *, page: int, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The KV slots of chosen pages.

    Args:
        pages: int32 [B, H_kv, P] and counts int32 [B, H_kv], as `choose_pages` gives them.
        slots: int32 [B, L], KV slot of each position.
        seq_lens: int32 or int64 [B].
        page: tokens a page.

    Returns:
        slots int32 [B, H_kv, page * P], in order of position, 0 after their counts, and counts int32 [B, H_kv]: the
        tokens of all pages, less those that the row's last page lacks.

    Raises:
        ValueError: as `choose_pages`.
    """
    op = "expand_pages"
    fits = pages.dim() == 3 and pages.dtype == torch.int32 and pages.is_contiguous()
    require(fits, op, "contiguous pages int32 [B, H_kv, P]", f"{pages.dtype} {list(pages.shape)}")
    fits = counts.shape == pages.shape[:2] and counts.dtype == torch.int32 and counts.is_contiguous()
    require(fits, op, f"contiguous counts int32 {list(pages.shape[:2])}", f"{counts.dtype} {list(counts.shape)}")
    fits = slots.dim() == 2 and slots.dtype == torch.int32 and len(slots) == len(pages)
    require(fits, op, f"slots int32 [{len(pages)}, L]", f"{slots.dtype} {list(slots.shape)}")
    _check_lens(op, seq_lens, len(pages))
    require(page >= 1, op, "page of 1 or more", page)
    require_one_device(op, pages, counts, slots, seq_lens)
    require_rows(op, slots, seq_lens)
    expand = implementation_of(reference.expand_pages, implementation, pages)
    return expand(pages, counts, slots, seq_lens, page=page)


def _check_lens(op: str, seq_lens: Tensor, batch: int) -> None:
    fits = seq_lens.dtype in (torch.int32, torch.int64) and seq_lens.shape == (batch,)
    require(fits, op, f"seq_lens int32 or int64 [{batch}]", f"{seq_lens.dtype} {list(seq_lens.shape)}")
