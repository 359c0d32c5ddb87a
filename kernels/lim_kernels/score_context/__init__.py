"""Each query head's logits over the whole context, from keys alone."""

from lim_kernels.score_context.api import score_context

__all__ = ["score_context"]
