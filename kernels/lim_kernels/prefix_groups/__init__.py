"""Which rows of a batch share leading KV slots."""

from lim_kernels.prefix_groups.api import MAX_LEVELS, PrefixGroups, find_prefix_groups

__all__ = ["MAX_LEVELS", "PrefixGroups", "find_prefix_groups"]
