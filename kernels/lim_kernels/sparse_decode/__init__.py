"""Decode attention over a chosen set of KV slots."""

from lim_kernels.sparse_decode.api import sparse_decode

__all__ = ["sparse_decode"]
