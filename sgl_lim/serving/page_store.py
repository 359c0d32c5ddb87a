"""Bounds of the keys of each page of the KV pool, layer by layer, for methods whose layers choose pages.

They belong to physical pages, and whoever writes a page's tokens learns them: prefills, mixed steps and decode steps,
within a captured graph too. So they need not follow the radix tree: a shared prefix has its bounds, a page that is
freed is bounded anew by its next owner, and no page is read that its present owner has not written.

They take a sixteenth of the memory of keys and values of 16 bits, beyond what SGLang sized its pool by.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lim_kernels import bound_pages
from lim_kernels.page_bounds import PAGE, PageBounds


class PageStore:
    """Bounds by layer.

    Args:
        pool: SGLang's KV pool of this rank; its page size is a multiple of 16.
        layers: which layers choose pages.
        dtype: of the bounds; that of queries.
    """

    def __init__(self, pool: Any, layers: Iterable[int], dtype: torch.dtype) -> None:
        self._pool = pool
        self._bounds: dict[int, PageBounds] = {}
        pages = -(-(pool.size + pool.page_size) // PAGE)
        for layer in layers:
            keys = pool.get_key_buffer(layer)
            # [pages, H_kv, D]
            sides = (torch.zeros(pages, *keys.shape[1:], dtype=dtype, device=keys.device) for _ in range(2))
            self._bounds[layer] = PageBounds(*sides)

    def learn(self, layer: int, slots: Tensor, positions: Tensor | None = None) -> None:
        """Bound the pages of slots that were just written, if `layer` chooses pages; may be captured in a graph.

        Args:
            slots: int32 or int64 [N], as `lim_kernels.bound_pages` takes them; SGLang's `out_cache_loc`.
            positions: as `GateStore` needs them; bounds do not depend on them.
        """
        bounds = self._bounds.get(layer)
        if bounds is not None:
            bound_pages(bounds, self._pool.get_key_buffer(layer), slots)

    def learn_rows(self, slots: Tensor, lens: Tensor) -> None:
        """Bound all pages of rows in every layer that chooses pages: their keys were not seen being written.

        Args:
            slots: int32 [b, L], KV slot of each position; lens: int64 [b], positions that have keys.
        """
        firsts = torch.arange(0, slots.shape[1], PAGE, device=slots.device)
        # The last slot of a page stands for all before it.
        lasts = torch.minimum(firsts + PAGE - 1, lens.unsqueeze(1) - 1)
        ends = slots.gather(1, lasts.clamp(min=0)).where(firsts < lens.unsqueeze(1), 0)
        for layer in self._bounds:
            self.learn(layer, ends.flatten())

    def of_layer(self, layer: int) -> PageBounds | None:
        """What `layer` chooses by; None for layers that do not choose pages."""
        return self._bounds.get(layer)

    @property
    def nbytes(self) -> int:
        """Memory of the bounds."""
        return sum(bounds.lows.nbytes + bounds.highs.nbytes for bounds in self._bounds.values())
