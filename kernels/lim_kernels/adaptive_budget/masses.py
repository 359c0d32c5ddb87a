"""Attention as integers, which all implementations share, so that sums do not depend on their order.

A score's bin is `trunc((TOP_SCORE - score) * BINS_PER_E)`, in float32, within 0 … BINS - 1: sixteen bins an octave of
weight, the heaviest first. A token of bin b weighs 2**(40 - (b - t) / 16), where t is the first bin in which a token of
its row is: the weight at the middle of bin b beside that at the middle of bin t. Its true weight is within a factor of
2**(1/32) of that, 2.2%; one 41 octaves below the heaviest is nothing. Fewer than 2**22 tokens weigh less than 2**62.
"""

BINS = 2048
STEPS = 4
"""A bin is 2**-STEPS of an octave."""
TOP_SCORE = 11.0
"""Bins reach from here down to -77.7; a row's heaviest log-weight is at least -log(4,194,304) = -15.2."""
BINS_PER_E = 23.083120346069336
"""16 / ln 2 in float32."""
ONE_BITS = 40
"""A token of bin t weighs 2**ONE_BITS."""
FACTOR_BITS = 22
FACTORS = tuple(round(2**FACTOR_BITS * 2 ** -(2.0**power / 2**STEPS)) for power in range(STEPS))
"""2**(-1/16), 2**(-2/16), 2**(-4/16) and 2**(-8/16) in units of 2**-FACTOR_BITS."""
SHARE_BITS = 20
"""A share of the attention is a multiple of 2**-SHARE_BITS."""
WINDOWS = 8
"""Windows that are tried have 1 … WINDOWS sixteenths of the budget."""


def window_of(budget: int, part: int) -> int:
    """Tokens of a window of `part` sixteenths of the budget; the current token at least."""
    return max(1, budget * part // 16)


def least_window(budget: int) -> int:
    """Tokens that a window has whatever they hold: a sixteenth of the budget, or 32 where a quarter is as many."""
    return max(window_of(budget, 1), min(window_of(budget, 4), 32))
