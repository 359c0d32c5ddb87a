"""Mathematics: what of a generation is its answer, and which answers are one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sgl_lim import command
from sgl_lim.programs.answer_forms import Form, read
from sgl_lim.programs.answer_text import answer_text
from sgl_lim.programs.exact_answers import for_library, plainly_same, read_alike
from sgl_lim.programs.graders import Answer, Comparison, GradingError
from sgl_lim.programs.math_process import MathProcess, WorkerLost
from sgl_lim.programs.problems import Problem
from sgl_lim.programs.run_records import Generation

_RULES = 3  # changes with what counts as an answer, or as the same one

# Seconds of processor time, not of the clock: a busy machine must not change a grade. Every request is tried for a
# moment, which is enough for most; the others get more. Only requests that come to no end are paid for. So all answers
# that can be computed are compared, however many there are, and what is costly takes nothing from them.
_MOMENT, _READ, _COMPARE = 0.12, 0.3, 0.7  # for one request: at first, then to read an answer, or to compare two
_MOMENTS, _MORE = 10.0, 3.5  # for all requests of one problem that come to no end: at first, and then


class MathGrader:
    """Mathematics, by rules of ours and the `math-verify` library, which runs in a process of its own.

    Raises:
        GradingError: `math-verify` is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise GradingError(
                "grading mathematical answers needs the math-verify library, which does not import here; "
                f"install it with: {command.how_to_install('math_verify')}"
            )
        self.name = f"math {_RULES} (math-verify {version('math-verify')})"
        self._process = MathProcess()

    def check(self) -> None:
        try:
            self._process.start()
        except WorkerLost as error:
            raise _broken(error) from error

    def extract(self, generation: Generation) -> Answer | None:
        found = answer_text(
            generation.text, finish_reason=generation.finish_reason, thinking_opened=generation.thinking_opened
        )
        form = None if found is None else read(found)
        return Answer(form.text, form) if form and form.text else None

    def expected(self, problem: Problem) -> Answer:
        form = read(problem.answer)
        if not form.text:
            raise GradingError(
                f"problem {problem.id!r}: there is nothing to compare in its answer {problem.answer!r}, so nothing "
                "could be graded against it; correct the answer or remove the problem"
            )
        return Answer(form.text, form)

    def comparison(self, stopped: Callable[[], bool]) -> Comparison:
        return _MathComparison(self._process, stopped)


@dataclass(frozen=True)
class _Reading:
    costly: bool
    number: float | None  # about

    def is_far_from(self, other: "_Reading") -> bool:
        """Whether both are numbers, and no rounding makes them one."""
        if self.number is None or other.number is None:
            return False
        return abs(self.number - other.number) > 1e-3 * max(abs(self.number), abs(other.number))


class _MathComparison:
    """The answers of one problem. What is costly is bounded, and an answer that is too costly equals its spelling."""

    def __init__(self, process: MathProcess, stopped: Callable[[], bool]) -> None:
        self._process = process
        self._stopped = stopped
        self._purses = [_Purse(_MOMENTS, _MOMENT), _Purse(_MORE, None)]
        self._readings: dict[str, _Reading] = {}
        self._same: dict[frozenset[Form], bool] = {}

    def same(self, one: Answer, other: Answer) -> bool:
        pair = frozenset((one.value, other.value))
        if pair not in self._same:
            forms = read_alike(one.value, other.value)
            plain = plainly_same(*forms)
            self._same[pair] = self._by_library(*forms) if plain is None else plain
        return self._same[pair]

    def by_spelling(self, answer: Answer) -> bool:
        reading = self._readings.get(answer.value.text)
        return reading is not None and reading.costly

    def _by_library(self, one: Form, other: Form) -> bool:
        texts = for_library(one, other)
        first, second = map(self._read, texts)
        if first.costly or second.costly:
            return False
        if not (one.percent or other.percent) and first.is_far_from(second):
            return False
        reply = self._ask({"same": sorted(texts)}, _COMPARE)
        return reply is not None and bool(reply["same"])

    def _read(self, text: str) -> _Reading:
        if text not in self._readings:
            reply = self._ask({"read": text}, _READ)
            number = None if reply is None or reply["number"] is None else float(reply["number"])
            self._readings[text] = _Reading(reply is None or reply["costly"], number)
        return self._readings[text]

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        for purse in self._purses:
            if purse.left <= 0:
                continue
            limit = purse.most or seconds
            try:
                reply = self._process.ask(request, limit, self._stopped)
            except WorkerLost as error:
                raise _broken(error) from error
            if reply is not None:
                return reply
            purse.left -= limit
        return None


@dataclass
class _Purse:
    left: float  # seconds of processor time
    most: float | None  # at a time; None for what the request may take


def _broken(error: WorkerLost) -> GradingError:
    install = command.how_to_install("math_verify")
    return GradingError(f"math-verify does not work here ({error}); install it again with: {install}")
