"""Sets of whole pages: the best-scored pages of each row and KV head, and the KV slots of their tokens."""

from lim_kernels.page_sets.api import choose_pages, expand_pages

__all__ = ["choose_pages", "expand_pages"]
