"""Numbers of sympy, compared exactly and within bounds; imported by `math_worker` alone, because it imports sympy."""

import math
from fractions import Fraction
from typing import Any
from zlib import crc32

from sympy import (
    Add,
    And,
    Basic,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Mul,
    Or,
    Pow,
    Rational,
    Symbol,
    binomial,
    exp,
    factorial,
    log,
    nan,
    oo,
    zoo,
)
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.relational import GreaterThan, LessThan, Relational, StrictGreaterThan, StrictLessThan
from sympy.matrices import MatrixBase

from sgl_lim.programs.decimals import has_end, has_enough_digits

_INEQUALITIES = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)
_MOST_BITS = 1 << 20  # of a number that is computed
_MOST_TERMS = 10_000  # of a sum or a product
_MOST_EXPANDED = 100  # power of a sum with variables
_DIGITS = 60  # to which different numbers are told apart before anything is simplified


class TooLarge(Exception):
    """An expression that nobody should compute: a tower of powers, a factorial of a factorial."""


def compare_exactly() -> None:
    """Make math-verify's comparison of numbers exact.

    Symptom: 1/2^98 equals 1/2^99, and 1/2004! equals 1/2006! (Math-Verify #14). Cause: their difference is rounded to
    15 decimals, and decimals to 6. Fix: `equal_numbers` in place of its `sympy_numeric_eq`, in this process only; what
    it says is no number goes on to the library's symbolic comparison. Remove when the library compares relatively.
    """
    from math_verify import grader as library

    library.sympy_numeric_eq = equal_numbers


def equal_numbers(one: Any, other: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Whether two expressions are one number; False also for those that are none. The roundings are not used."""
    from math_verify import grader as library

    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape == other.shape and all(
            library.sympy_expr_eq(a, b, float_rounding, numeric_precision)
            for a, b in zip(one.flat(), other.flat(), strict=True)
        )
    if not isinstance(one, Expr) or not isinstance(other, Expr):
        return False
    parts = [library.get_pct_val(side) for side in (one, other)]
    if (parts[0] is None) != (parts[1] is None):  # 12% is 12 where per cent are asked for
        bare = [side if part is None else part for part, side in zip(parts, (one, other), strict=True)]
        if equals(*bare):
            return True
    if equals(library.safe_sympy_doit(one), library.safe_sympy_doit(other)):
        return True
    # Report: "log_2 0.5 is not -1": what is computed from decimals is exact only if they are.
    exact = [side if isinstance(side, Float) else _exact(side) for side in (one, other)]
    return exact != [one, other] and equals(*map(library.safe_sympy_doit, exact))


def equals(one: Any, other: Any) -> bool:
    """Whether two expressions are one, by their values if they are numbers, else as they are written."""
    if one.free_symbols or other.free_symbols or not (one.is_number and other.is_number):
        return bool(_exact(one) == _exact(other))
    if one in (nan, zoo, oo, -oo) or other in (nan, zoo, oo, -oo):
        return bool(one == other)
    if isinstance(one, Float) != isinstance(other, Float):
        decimal, number = (one, other) if isinstance(one, Float) else (other, one)
        return _is_decimal_of(decimal, _exact(number))
    return _equal_exactly(_exact(one), _exact(other))


def _equal_exactly(one: Any, other: Any) -> bool:
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    near, far = one.evalf(_DIGITS), other.evalf(_DIGITS)
    if abs(near - far) > Float(10) ** (10 - _DIGITS) * max(abs(near), abs(far)):
        return False
    proven = (one - other).equals(0)
    return True if proven is None else bool(proven)


def _is_decimal_of(decimal: Any, number: Any) -> bool:
    """Whether a decimal is a number, or a rounding of one that no decimal is."""
    text = str(decimal)
    value = Fraction(text)
    if number.is_Rational and has_end(int(number.q)):
        return bool(Rational(value) == number)
    digits, _, exponent = text.partition("e")
    ulp = Fraction(10) ** (int(exponent or 0) - len(digits.partition(".")[2].rstrip("0")))
    return has_enough_digits(value, ulp) and bool(abs(number.evalf(_DIGITS) - Rational(value)) <= Rational(ulp))


def _exact(expression: Any) -> Any:
    """`expression` with its decimals as the fractions that they say."""
    return expression.xreplace({decimal: Rational(str(decimal)) for decimal in expression.atoms(Float)})


def is_equation(expression: Any) -> bool:
    """Report: "5x - 7y = 0 equals 0": whether it is an equation of variables, not the value of a name or a sum."""
    from latex2sympy2_extended import is_expr_of_only_symbols

    if not isinstance(expression, Eq) or isinstance(expression.lhs, Symbol):
        return False
    return expression.rhs == 0 or not is_expr_of_only_symbols(expression.lhs)


def is_relation(expression: Any) -> bool:
    """Whether an expression is an equation or an inequality."""
    return isinstance(expression, Relational)


def joined(expression: Any) -> Any:
    """Report: "x < 2 or x > 3 is not (-oo, 2) u (3, oo)": inequalities in a list are the union of what they allow."""
    if not isinstance(expression, FiniteSet):
        return expression
    parts = [And(*part.args) if isinstance(part, And) else part for part in expression.args]
    if all(isinstance(part, (And, *_INEQUALITIES)) for part in parts):
        return Or(*parts).as_set()
    return expression


def number_text(expression: Any) -> str | None:
    """The number that an expression is, to 15 digits; with variables, where each has a value that its name decides.

    Expressions whose numbers are far apart are different, and need no comparison. None if an expression is no number
    then, if it is a variable, which may be a word, or if a percentage in it counts.
    """
    from math_verify import grader as library

    if not isinstance(expression, Expr) or isinstance(expression, Symbol):
        return None
    if library.get_pct_val(expression) is not None:
        return None
    values = {symbol: Rational(crc32(symbol.name.encode()) % 997 + 500, 997) for symbol in expression.free_symbols}
    value = library.safe_sympy_doit(expression).subs(values).evalf(15)
    return str(value) if value.is_Float or value.is_Integer or value.is_Rational else None


def check_size(expression: Any) -> None:
    """Whether an expression can be computed.

    Raises:
        TooLarge: one of its numbers has more bits than `_MOST_BITS`, or it has too many terms.
    """
    if isinstance(expression, MatrixBase):
        for element in expression.flat():
            check_size(element)
    elif isinstance(expression, Basic):
        _bits(expression)


def _bits(expression: Basic) -> float:
    """About how many bits the numbers in an expression have once they are computed, from above."""
    if isinstance(expression, ExprWithLimits):
        _check_terms(expression)
    sizes = [_bits(part) for part in expression.args]
    bits = max(sizes, default=1.0)
    if isinstance(expression, Rational):
        bits = float(max(expression.p.bit_length(), expression.q.bit_length()))
    elif isinstance(expression, Float):
        bits = abs(math.log2(abs(expression))) + 53 if expression else 1.0
    elif isinstance(expression, Pow):
        bits = _bits_of_power(expression, *sizes)
    elif isinstance(expression, factorial):
        bits = 2.0 ** min(sizes[0], 30) * sizes[0]
    elif isinstance(expression, binomial):
        bits = 2.0 ** min(sizes[0], 30)
    elif isinstance(expression, Mul):
        bits = sum(sizes)
    elif isinstance(expression, Add):
        bits += len(sizes)
    elif isinstance(expression, (exp, log)):
        bits = 64.0
    if bits > _MOST_BITS:
        raise TooLarge
    return bits


def _bits_of_power(power: Pow, base_bits: float, exponent_bits: float) -> float:
    base, exponent = power.args
    if exponent.free_symbols or not exponent.is_number:
        return base_bits + exponent_bits
    # Of other exponents only a bound is known.
    size = abs(float(exponent)) if isinstance(exponent, (Rational, Float)) else 2.0 ** min(exponent_bits, 60)
    if isinstance(base, Add) and base.free_symbols and size > _MOST_EXPANDED:
        raise TooLarge
    return float(base_bits * min(max(size, 1.0), 1 << 60))


def _check_terms(expression: Any) -> None:
    for limits in expression.limits:
        if len(limits) != 3:
            continue
        for bound in limits[1:]:
            _bits(bound)
        count = limits[2] - limits[1]
        if count.is_number and count.is_finite and abs(float(count)) > _MOST_TERMS:
            raise TooLarge
