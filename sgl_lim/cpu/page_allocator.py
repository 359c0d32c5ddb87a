"""SGLang 0.5.17's page allocator with its two Triton launches done in torch, for the plain CPU platform.

Later releases fall back to torch themselves. Remove with 0.5.17.
"""

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages
from torch import Tensor


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """Same contract as the parent: int64 slots, page-aligned per request, None when pages run out."""

    free_pages: Tensor

    def alloc_extend(
        self,
        prefix_lens: Tensor,
        prefix_lens_cpu: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor,
        last_loc: Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> Tensor | None:
        """Slots for `extend_num_tokens` new tokens, request after request."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        pages = self._pages(num_new_pages)
        if pages is None:
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, pages, slots, self.page_size, self.device)
        return slots

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        """One slot a request: the next in its last page, or the first of a new page."""
        starts_page = (seq_lens - 1) % self.page_size == 0
        pages = self._pages(int(starts_page.sum()))
        if pages is None:
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = pages * self.page_size
        return slots

    def _pages(self, count: int) -> Tensor | None:
        if self.need_sort and count > len(self.free_pages):
            self.merge_and_sort_free()
        if count > len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return pages
