"""When a decimal stands for a number that no decimal is: 0.333333 for 1/3, but not 0.333."""

from fractions import Fraction

_DIGITS = 6  # that it needs, and needs behind its point


def has_enough_digits(value: Fraction, ulp: Fraction) -> bool:
    """Whether a decimal is precise enough to stand for a number within one unit of its last place, `ulp`."""
    return ulp <= Fraction(1, 10**_DIGITS) and abs(value) >= ulp * 10 ** (_DIGITS - 1)


def has_end(denominator: int) -> bool:
    """Whether fractions with this denominator, in lowest terms, are decimals: nothing but themselves equals them."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
