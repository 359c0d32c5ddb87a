"""Token selection over all heads at once (LessIsMore, arXiv 2508.07101)."""

from lim_kernels.select_tokens.api import AGGREGATES, choose_tokens, deepen_scores, score_tokens, select_tokens
from lim_kernels.select_tokens.places import MAX_UNION

__all__ = ["AGGREGATES", "MAX_UNION", "choose_tokens", "deepen_scores", "score_tokens", "select_tokens"]
