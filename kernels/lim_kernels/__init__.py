"""Sparse-decode operators on plain tensors, one folder an operator.

Every operator takes `implementation=None`: a name from the operator's table, or None for the best one on the
tensors' device. A named implementation is used or refused, never replaced.
"""

from lim_kernels.adaptive_budget import adapt_budgets
from lim_kernels.count_decode_step import count_decode_step, count_sets
from lim_kernels.decode_with_scores import decode_with_scores
from lim_kernels.group_selection import choose_for_groups, groups_of_sets
from lim_kernels.grouped_decode import grouped_decode
from lim_kernels.operands import Scaling, SetSizes
from lim_kernels.page_bounds import bound_pages, expand_pages, score_pages
from lim_kernels.prefix_groups import find_prefix_groups
from lim_kernels.select_tokens import choose_tokens, score_tokens, select_tokens
from lim_kernels.set_memory import decide_actions, keep_sets, place_sets
from lim_kernels.sparse_decode import sparse_decode

__all__ = [
    "Scaling",
    "SetSizes",
    "adapt_budgets",
    "bound_pages",
    "choose_for_groups",
    "choose_tokens",
    "count_decode_step",
    "count_sets",
    "decide_actions",
    "decode_with_scores",
    "expand_pages",
    "find_prefix_groups",
    "grouped_decode",
    "groups_of_sets",
    "keep_sets",
    "place_sets",
    "score_pages",
    "score_tokens",
    "select_tokens",
    "sparse_decode",
]
