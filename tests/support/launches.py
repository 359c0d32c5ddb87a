"""What launchers ask of the device, without one: every launch's kernel, grid and arguments, on meta tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from lim_kernels import (
    Scaling,
    SetSizes,
    adapt_budgets,
    choose_for_groups,
    choose_tokens,
    decode_with_scores,
    expand_pages,
    find_prefix_groups,
    grouped_decode,
    score_context,
    score_pages,
    score_tokens,
    sparse_decode,
)
from lim_kernels.page_bounds import PAGE, PageBounds
from lim_kernels.rehearsal import MULTIPROCESSORS

TRITON = {"implementation": "triton"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        """That it starts."""
        return prod(self.grid)


@contextmanager
def launches_recorded(multiprocessors: int = MULTIPROCESSORS) -> Iterator[list[Launch]]:
    """Launches inside are recorded and do not run."""
    from lim_kernels.split_decode import merge_kernel

    launches: list[Launch] = []

    def launcher(kernel, grid):
        def launch(**arguments):
            launches.append(Launch(kernel.fn.__name__, tuple(grid), arguments))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(merge_kernel), "__getitem__", launcher)
        for name in ("triton_support", "split_decode", "group_decode", "group_selection.triton"):
            module = __import__(f"lim_kernels.{name}", fromlist=["multiprocessors"])
            patch.setattr(module, "multiprocessors", lambda device: multiprocessors)
        yield launches


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """On the meta device."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def decode_step(batch: int, width: int, *, heads: int = 32, kv_heads: int = 8, budget: int = 2048) -> None:
    """Launch once every operator whose operands are as wide as the pool's rows, with and without prefix groups."""
    q, cache = empty(batch, heads, 128, dtype=torch.bfloat16), empty(1 << 16, kv_heads, 128, dtype=torch.bfloat16)
    slots, lens = empty(batch, width), empty(batch)
    scaling, beyond = Scaling(0.1), {"score_beyond": budget, **TRITON}
    groups = find_prefix_groups(slots, lens, granule=128, **TRITON)
    grouped_decode(q, cache, cache, slots, lens, groups, scaling, scored=True, **beyond)
    score_context(q, cache, slots, lens, scaling, groups=groups, **beyond)
    decode_with_scores(q, cache, cache, slots, lens, scaling, **beyond)
    lse, logits = score_context(q, cache, slots, lens, scaling, **beyond)
    sizes = SetSizes(budget, recent=budget // 4 - 4, sinks=4)
    for aggregate in ("union", "max", "sum"):
        scores = score_tokens(logits, lens, sizes, aggregate=aggregate, lse=lse, **TRITON)
    sets, counts = choose_tokens(scores, lens, sizes, slots=slots, **TRITON)
    sparse_decode(q, cache, cache, sets, counts, scale=0.1, **TRITON)
    choose_for_groups(scores, lens, groups, sizes, combine="max", slots=slots, **TRITON)
    adapt_budgets(scores, lens, sizes, top_p=0.9, **TRITON)
    bounds = PageBounds(*(empty(1 << 12, kv_heads, 128, dtype=torch.bfloat16) for _ in range(2)))
    score_pages(q, bounds, slots, lens, score_beyond=budget, **TRITON)
    # `choose_pages` starts a program a row and KV head, or other kernels where rows have more than 8,192 pages.
    chosen = empty(batch, kv_heads, budget // PAGE), empty(batch, kv_heads)
    expand_pages(*chosen, slots, lens, page=PAGE, **TRITON)
