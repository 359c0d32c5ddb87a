"""Dense decode attention that also returns each query head's logits."""

from lim_kernels.decode_with_scores.api import decode_with_scores

__all__ = ["decode_with_scores"]
