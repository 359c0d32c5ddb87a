"""Bounds of the keys of each page of tokens (Quest, arXiv 2406.10774)."""

from lim_kernels.page_bounds.api import bound_pages, score_pages
from lim_kernels.page_bounds.state import PAGE, PageBounds

__all__ = ["PAGE", "PageBounds", "bound_pages", "score_pages"]
