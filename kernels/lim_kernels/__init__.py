"""Sparse-decode operators on plain tensors, one folder an operator.

- `api.py` is the public entry: its docstring is the contract, it checks operands and picks an implementation.
- `reference.py` is the operator's specification in plain torch, and also what a CPU server runs: it has to be right
  first, to read as a specification second, and to be fast on a CPU third. Where torch's arithmetic hides the rule, the
  rule is written as pseudocode at the file's head.
- `triton.py` is what a GPU server runs. Every implementation gives the reference's results, integers exactly.

Every operator takes `implementation=None`: "reference", "triton", or None for Triton on a GPU and the reference
elsewhere. A named implementation is used or refused, never replaced. Triton is imported when it is wanted first.
"""

from lim_kernels.adaptive_budget import adapt_budgets
from lim_kernels.block_gates import gate_keys, score_blocks
from lim_kernels.count_decode_step import count_decode_step, count_sets
from lim_kernels.decode_with_scores import decode_with_scores
from lim_kernels.draft_sets import DraftMemory, DraftSizes, place_drafts
from lim_kernels.group_selection import choose_for_groups, groups_of_sets
from lim_kernels.grouped_decode import grouped_decode
from lim_kernels.operands import Scaling, SetSizes
from lim_kernels.page_bounds import bound_pages, score_pages
from lim_kernels.page_sets import choose_pages, expand_pages
from lim_kernels.prefix_groups import find_prefix_groups
from lim_kernels.score_context import score_context
from lim_kernels.select_tokens import choose_tokens, deepen_scores, score_tokens, select_tokens
from lim_kernels.set_memory import decide_actions, keep_sets, place_sets
from lim_kernels.sparse_decode import sparse_decode

__all__ = [
    "DraftMemory",
    "DraftSizes",
    "Scaling",
    "SetSizes",
    "adapt_budgets",
    "bound_pages",
    "choose_for_groups",
    "choose_pages",
    "choose_tokens",
    "count_decode_step",
    "count_sets",
    "decide_actions",
    "decode_with_scores",
    "deepen_scores",
    "expand_pages",
    "find_prefix_groups",
    "gate_keys",
    "grouped_decode",
    "groups_of_sets",
    "keep_sets",
    "place_drafts",
    "place_sets",
    "score_blocks",
    "score_context",
    "score_pages",
    "score_tokens",
    "select_tokens",
    "sparse_decode",
]
