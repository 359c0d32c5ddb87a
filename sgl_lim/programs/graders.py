"""What a grader is, and the exact ones: a kind of problem each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sgl_lim.programs.problems import Problem
from sgl_lim.programs.run_records import Generation
from sgl_lim.tasks.chains import parse_answer
from sgl_lim.tasks.needles import parse_code


class GradingError(RuntimeError):
    """Problems cannot be graded here; the message says what to install or to change."""


@dataclass(frozen=True)
class Answer:
    """An answer as text for people, and as the value that is compared."""

    text: str
    value: Any


class Comparison(Protocol):
    """Compares the answers of one problem, within what one problem may take."""

    def same(self, one: Answer, other: Answer) -> bool:
        """Whether two answers are one, in either order."""

    def by_spelling(self, answer: Answer) -> bool:
        """Whether an answer was too costly to read, so that it equals nothing but its own spelling."""


class Grader(Protocol):
    """Extracts and compares answers of one kind of problem."""

    name: str
    """With its version: results of different graders are not compared."""

    def check(self) -> None:
        """Wait until it can grade.

        Raises:
            GradingError: it cannot.
        """

    def extract(self, generation: Generation) -> Answer | None:
        """The final answer of a generation, or None if it has none."""

    def expected(self, problem: Problem) -> Answer:
        """The problem's own answer.

        Raises:
            GradingError: it cannot be understood, so no generation could be graded against it.
        """

    def comparison(self, stopped: Callable[[], bool]) -> Comparison:
        """For the answers of one problem; `stopped` says whether the run is to end."""


class NumberGrader:
    """Answers that are numbers, compared exactly. A generation that was cut off behind its number has it still."""

    def __init__(self, name: str, parse: Callable[[str], str | None]) -> None:
        """Of a kind of generations whose number `parse` finds."""
        self.name = name
        self._parse = parse

    def check(self) -> None:
        return

    def extract(self, generation: Generation) -> Answer | None:
        number = self._parse(generation.text)
        return None if number is None else Answer(number, number)

    def expected(self, problem: Problem) -> Answer:
        return Answer(problem.answer, problem.answer)

    def comparison(self, stopped: Callable[[], bool]) -> Comparison:
        return self

    def same(self, one: Answer, other: Answer) -> bool:
        return bool(one.value == other.value)

    def by_spelling(self, answer: Answer) -> bool:
        return False


class ChainGrader(NumberGrader):
    """Chains: the number after the last `answer`."""

    def __init__(self) -> None:
        super().__init__("chain 1", parse_answer)


class NeedleGrader(NumberGrader):
    """Needles: the first number."""

    def __init__(self) -> None:
        super().__init__("needle 1", parse_code)
