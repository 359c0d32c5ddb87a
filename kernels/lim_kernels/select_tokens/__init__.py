"""Token selection over all heads at once (LessIsMore, arXiv 2508.07101)."""

from lim_kernels.select_tokens.api import AGGREGATES, choose_tokens, score_tokens, select_tokens

__all__ = ["AGGREGATES", "choose_tokens", "score_tokens", "select_tokens"]
