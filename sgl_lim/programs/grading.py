"""Right or wrong: answers out of generations, votes over them, and what a chain's text says beyond its answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sgl_lim.programs.problems import Kind, Problem
from sgl_lim.tasks.chains import matching_words, parse_answer
from sgl_lim.tasks.needles import parse_code

INSTALL_MATH_VERIFY = "pip install 'math-verify>=0.9,<1'"  # the extra `math` of pyproject.toml
_T = TypeVar("_T")


class GradingError(RuntimeError):
    """Problems cannot be graded here; the message says what to install or to change."""


@dataclass(frozen=True)
class Answer:
    """An answer as text for people, and as the value that is compared."""

    text: str
    value: Any


class Grader(Protocol):
    """Extracts and compares answers of one kind of problem. Called from the main thread."""

    def extract(self, text: str) -> Answer | None:
        """The final answer of a generation, or None if it has none."""

    def expected(self, problem: Problem) -> Answer:
        """The problem's own answer.

        Raises:
            GradingError: it cannot be understood, so no generation could be graded against it.
        """

    def same(self, expected: Answer, given: Answer) -> bool:
        """Whether `given` is the answer `expected`."""


class NumberGrader:
    """Answers that are numbers, compared exactly."""

    def __init__(self, parse: Callable[[str], str | None]) -> None:
        """Of a kind of generations whose number `parse` finds."""
        self._parse = parse

    def extract(self, text: str) -> Answer | None:
        number = self._parse(text)
        return None if number is None else Answer(number, number)

    def expected(self, problem: Problem) -> Answer:
        return Answer(problem.answer, problem.answer)

    def same(self, expected: Answer, given: Answer) -> bool:
        return bool(expected.value == given.value)


class ChainGrader(NumberGrader):
    """Chains: the number after the last `answer`."""

    def __init__(self) -> None:
        super().__init__(parse_answer)


class NeedleGrader(NumberGrader):
    """Needles: the first number."""

    def __init__(self) -> None:
        super().__init__(parse_code)


class MathGrader:
    """Mathematics, by the `math-verify` library.

    A generation whose `<think>` was never closed has no answer: it was cut off before it gave one. The library's
    time limits are signals, so a grader works in the main thread only.

    Raises:
        GradingError: `math-verify` is not installed.
    """

    def __init__(self) -> None:
        try:
            from math_verify import parse, verify
        except ImportError as error:
            raise GradingError(
                f"grading mathematical answers needs the math-verify library, which does not import here ({error}); "
                f"install it with: {INSTALL_MATH_VERIFY}"
            ) from error
        self._parse = parse
        self._verify = verify

    def extract(self, text: str) -> Answer | None:
        final = text.rpartition("</think>")[2]  # the whole text if there is no such tag
        return None if "<think>" in final else self._answer(final)

    def expected(self, problem: Problem) -> Answer:
        answer = self._answer(f"${problem.answer}$")
        if answer is None:
            raise GradingError(
                f"problem {problem.id!r}: math-verify cannot read its answer {problem.answer!r}, so nothing could be "
                "graded against it; correct the answer or remove the problem"
            )
        return answer

    def same(self, expected: Answer, given: Answer) -> bool:
        return bool(self._verify(expected.value, given.value))

    def _answer(self, text: str) -> Answer | None:
        parsed = self._parse(text)
        return Answer(str(parsed[-1]), parsed) if parsed else None


def make_grader(kind: Kind) -> Grader:
    """The grader of a kind of problem.

    Raises:
        GradingError: what it needs is not installed.
    """
    if kind == "math":
        return MathGrader()
    return ChainGrader() if kind == "chain" else NeedleGrader()


@dataclass(frozen=True)
class SampleGrade:
    """One generation. The chain fields are None for other problems."""

    answer: str | None
    correct: bool
    whole_chain: bool | None = None  # every word of the solution, and no other
    words_matching: int | None = None
    words_total: int | None = None


@dataclass(frozen=True)
class ItemGrade:
    """All generations of one problem: one for solve, several and their vote for self-consistency."""

    answer: str | None
    correct: bool
    samples: tuple[SampleGrade, ...]


def majority(votes: Sequence[_T | None], same: Callable[[_T, _T], bool]) -> _T | None:
    """The most frequent vote; of equally frequent ones the one cast first. None casts no vote.

    `same(first, later)` says whether two votes are for one answer, and each vote joins the first that it equals.
    """
    groups: list[list[_T]] = []
    for vote in votes:
        if vote is None:
            continue
        group = next((group for group in groups if same(group[0], vote)), None)
        if group is None:
            groups.append([vote])
        else:
            group.append(vote)
    return max(groups, key=len)[0] if groups else None


def grade(problem: Problem, texts: Sequence[str], grader: Grader) -> ItemGrade:
    """Grade the generations of one problem and their majority vote (of one generation: itself).

    Raises:
        GradingError: the problem's own answer cannot be understood.
    """
    expected = grader.expected(problem)
    answers = [grader.extract(text) for text in texts]
    voted = majority(answers, grader.same)
    return ItemGrade(
        answer=None if voted is None else voted.text,
        correct=voted is not None and grader.same(expected, voted),
        samples=tuple(
            _grade_sample(problem, text, answer, answer is not None and grader.same(expected, answer))
            for text, answer in zip(texts, answers, strict=True)
        ),
    )


def _grade_sample(problem: Problem, text: str, answer: Answer | None, correct: bool) -> SampleGrade:
    given = None if answer is None else answer.text
    if problem.solution is None:
        return SampleGrade(given, correct)
    matching, total = matching_words(text, problem.solution)
    return SampleGrade(given, correct, text.split() == problem.solution.split(), matching, total)
