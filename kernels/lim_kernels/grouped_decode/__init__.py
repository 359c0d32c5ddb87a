"""Dense decode attention that reads what rows share once for all of them."""

from lim_kernels.grouped_decode.api import grouped_decode

__all__ = ["grouped_decode"]
