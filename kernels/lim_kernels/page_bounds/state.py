"""What is known of a KV pool's pages."""

from dataclasses import dataclass

from torch import Tensor

PAGE = 16
"""Tokens a page. KV slots 16 p … 16 p + 15 are page p, and hold 16 tokens of one request in order, or fewer."""


@dataclass(frozen=True)
class PageBounds:
    """Elementwise bounds of the stored keys of each page and KV head."""

    lows: Tensor  # floating [pages, H_kv, D]
    highs: Tensor  # the same
