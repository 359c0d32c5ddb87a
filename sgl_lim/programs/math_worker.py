"""The process that reads and compares mathematical answers: `python -m sgl_lim.programs.math_worker`.

It exists to be killed. No signal handler of Python's interrupts a big power or a loop of C, so each request has a
limit of processor time, after which the kernel ends the process that works on it. Its parent, which has imported
math-verify and does nothing else, forks the next one.

Standard input has a request a line, standard output a reply a line, both JSON. A worker that begins says
`{"ready": true}`, so a reply that never came is followed by that. Requests:

- `{"read": X, "seconds": S}`: `{"costly": bool, "number": text or null}`, as `exact_math.number_text` says.
- `{"same": [X, Y], "seconds": S}`: `{"same": bool}`.
"""

import json
import logging
import os
import resource
import signal
import sys
import warnings
from functools import lru_cache
from typing import Any

from sgl_lim import command
from sgl_lim.programs.exact_math import (
    TooLarge,
    check_size,
    compare_exactly,
    is_equation,
    is_relation,
    joined,
    number_text,
)
from sgl_lim.programs.exact_parsing import multiply_as_written, plain_value, with_usual_symbols

_COSTLY = TooLarge, MemoryError, RecursionError
_MEMORY_BYTES = 4 << 30  # of address space
_LONGEST = 1000  # characters of an answer that is read
_USUAL = (  # parsed once before the first fork, because the parser learns from each form
    r"\frac{3\sqrt{2}}{4}", r"(-\infty, 2] \cup [3, 5)", r"x^2-2x+1", r"2 < x \le 3", r"\{1\pm\sqrt{5},-2\}",
    r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\left[ \frac{\pi^2}{8}, 5 \right]", r"2\sin{x}+\log_2{8}",
    r"3!+\binom{4}{2}", r"y=-2x+1", r"e^{i\pi}", r"1.25", r"2 \times 10^{-7}", r"12\%", r"(1,-16,-4)",
    r"\sum_{k=1}^{3} k", "6-5i", r"ab", r"\pi /2",
)  # fmt: skip
_USUAL_PAIRS = (
    (r"\sin{2x}", r"2\sin{x}\cos{x}"), (r"x^2-1", r"(x-1)(x+1)"), ("2x-y=1", "4x-2y=2"), ("(2,3)", "2 < x < 3"),
    (r"\sqrt{12}", r"2\sqrt{3}"), ("1, 2, 3", "3, 2, 1"), ("0.333333", r"\frac{1}{3}"),
)  # fmt: skip


def main() -> None:
    """Fork workers, one at a time, until standard input ends."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    compare_exactly()
    multiply_as_written()
    for text in _USUAL:
        _read(text)
    for one, other in _USUAL_PAIRS:
        _same(one, other)
    while True:
        worker = os.fork()
        if worker == 0:
            _serve()
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say({"ready": True})
    with os.fdopen(os.dup(0), "rb") as requests:
        for line in iter(requests.readline, b""):
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends this process
            reply = _read(request["read"]) if "read" in request else {"same": _same(*request["same"])}
            signal.setitimer(signal.ITIMER_PROF, 0)
            _say(reply)


def _say(reply: dict[str, Any]) -> None:
    os.write(1, json.dumps(reply).encode() + b"\n")  # one write, so a killed worker leaves no half line


def _read(text: str) -> dict[str, Any]:
    try:
        parsed = _parse(text)
        return {"costly": False, "number": number_text(parsed[0]) if parsed else None}
    except _COSTLY:
        return {"costly": True, "number": None}


def _same(one: str, other: str) -> bool:
    """Whether two answers are one, whichever of them math-verify takes for the right one."""
    from math_verify import verify

    try:
        first, second = _parse(one), _parse(other)
    except _COSTLY:
        return False
    for these, those in ((first, second), (second, first)):
        if these and is_equation(these[0]) and not (those and is_relation(those[0])):
            return False
    options: dict[str, Any] = {"allow_set_relation_comp": True, "timeout_seconds": None}
    return verify(first, second, **options) or verify(second, first, **options)


@lru_cache(maxsize=1000)
def _parse(text: str) -> list[Any]:
    """What math-verify makes of LaTeX: a list of one expression, or of none.

    Raises:
        TooLarge: nobody should compute it.
    """
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if len(text) > _LONGEST:
        raise TooLarge
    # Units are gone already, and it would drop the m of 2m. What fractions and roots take stands in braces.
    as_it_stands = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none", equations=False
    )
    config = LatexExtractionConfig(normalization_config=as_it_stands)
    found = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    for expression in found:
        check_size(expression)
    return [joined(plain_value(with_usual_symbols(expression))) for expression in found]


if __name__ == "__main__":
    sys.setrecursionlimit(3000)
    command.run(main)
