"""What math-verify reads, corrected; imported by `math_worker` alone, because it imports sympy."""

import re
from typing import Any

from sympy import Basic, Eq, Expr, I, Symbol
from sympy.matrices import MatrixBase

from sgl_lim.programs.exact_math import equals

_PLAIN_FRACTION = re.compile(r"\\frac\{\d+\}\{\d+\}")


def multiply_as_written() -> None:
    r"""Keep the parser from reading a product as a mixed number.

    Symptom: 3(4) is 7, and \binom{6}{2}\binom{4}{2} is 21. Cause: an integer and a positive number behind it are
    added, whatever the number is. Fix: they are added where the second one is a fraction, in this process only. Remove
    when the library looks at what is written.
    """
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    read = _Latex2Sympy.convert_postfix_list

    def convert_postfix_list(self: Any, parts: Any, first: int = 0) -> Any:
        texts = [part.getText() for part in parts[first : first + 2]]
        if len(texts) == 2 and not (texts[0].isdigit() and _PLAIN_FRACTION.fullmatch(texts[1])):
            value = self.convert_postfix(parts[first])
            if isinstance(value, (Expr, MatrixBase)):
                rest = convert_postfix_list(self, parts, first + 1)
                matrices = isinstance(value, MatrixBase) or isinstance(rest, MatrixBase)
                return (self.mat_mul_flat if matrices else self.mul_flat)(value, rest)
        return read(self, parts, first)

    _Latex2Sympy.convert_postfix_list = convert_postfix_list


def with_usual_symbols(expression: Any) -> Any:
    """Report: "(1+i)^2 is not 2i": i is the imaginary unit, and letters are real, however an answer is written."""
    if not isinstance(expression, (Basic, MatrixBase)):
        return expression
    usual = {letter: Symbol(letter.name, real=True) for letter in expression.free_symbols}
    if not usual:
        return expression
    try:
        complex_ones = {letter: I if letter.name == "i" else real for letter, real in usual.items()}
        return expression.subs(complex_ones, simultaneous=True)
    except (TypeError, ValueError):  # i < j: there it is a number to count with
        return expression.subs(usual, simultaneous=True)


def plain_value(expression: Any) -> Any:
    """Report: "3 x 4 = 12 is not 12": what the two sides of an equation between numbers are, if they are one."""
    from math_verify import grader as library

    if isinstance(expression, Eq) and all(side.is_number for side in expression.args):
        sides = [library.safe_sympy_doit(side) for side in expression.args]
        return sides[1] if equals(*sides) else expression
    return expression
