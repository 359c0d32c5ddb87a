"""Which rows of a batch share leading KV slots."""

from lim_kernels.prefix_groups.api import find_prefix_groups
from lim_kernels.prefix_groups.state import MAX_LEVELS, PrefixGroups

__all__ = ["MAX_LEVELS", "PrefixGroups", "find_prefix_groups"]
