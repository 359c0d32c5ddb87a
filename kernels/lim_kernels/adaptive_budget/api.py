"""Public entry of adaptive budgets: what rows get, validation, dispatch."""

from dataclasses import replace

from torch import Tensor

from lim_kernels.adaptive_budget import reference
from lim_kernels.adaptive_budget.masses import SHARE_BITS, WINDOWS, window_of
from lim_kernels.dispatch import implementation_of, require
from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens.api import check_scores


def adapt_budgets(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    find_recent: bool = False,
    top_p: float | None = None,
    floor: int = 1,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How many tokens each row needs, and how long its window is, by the attention that they hold.

    A row's attention is the sum of exp(score) over all its positions. What tokens hold of it is measured in bins of
    1/16 octave, in integers (see `masses`): a token's weight is right within 2.2%, one 41 octaves below the heaviest
    weighs nothing, and every implementation finds the same sizes. In rows longer than the budget:

    - With `find_recent` the window gets the share of the budget that it holds of the attention: it is the longest of
      1 … 8 sixteenths of the budget whose tokens hold as many sixteenths of the attention at least, but not shorter
      than one sixteenth, nor than 32 tokens where a quarter of the budget is as many, nor than that quarter where it
      is not. (The current token is always in it; sixteenths are rounded down.)
    - With `top_p` the row's budget is the smallest with which sinks, window and the heaviest candidates hold that share
      of the attention, but not less than `floor`, nor than sinks, window and one token, nor more than `budget`.

    Args:
        scores: float32 [B, L], log-weights as `score_tokens` gives them by "max" or "sum" ("union" gives places, which
            say nothing of weights); read in rows longer than the budget, at all their positions.
        seq_lens: int32 or int64 [B].
        sizes: as in `score_tokens`.
        find_recent: whether to find a window for each row, instead of `sizes.recent`, which is not read then.
        top_p: share of the attention between 0 and 1, or None to give each row the whole budget.
        floor: least tokens of a row longer than the budget, with `top_p`.

    Returns:
        budgets and recents, int32 [B] each, as `choose_tokens` takes them. A row within the budget gets its length, and
        the given window or the shortest.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown implementation, nothing to adapt, a share not between 0 and
            1, or a budget that does not cover floor, sinks and window (half the budget, where it is to be found).
    """
    op = "adapt_budgets"
    check_scores(op, scores, seq_lens, None)
    budget = sizes.budget
    longest = replace(sizes, recent=window_of(budget, WINDOWS)) if find_recent else sizes
    longest.check(op)
    require(find_recent or top_p is not None, op, "a share top_p or find_recent=True", "neither")
    require(top_p is None or 0 < top_p < 1, op, "top_p between 0 and 1", top_p)
    require(1 <= floor <= budget, op, f"a floor of 1 to {budget} tokens", floor)
    adapt = implementation_of(reference.adapt_budgets, implementation, scores)
    share = None if top_p is None else round(top_p * 2**SHARE_BITS)
    return adapt(scores, seq_lens, sizes, find_recent=find_recent, share=share, floor=floor)
