"""Right or wrong: the grades of generations, votes over them, and what a chain's text says beyond its answer."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from sgl_lim.programs.graders import Answer, ChainGrader, Comparison, Grader, NeedleGrader
from sgl_lim.programs.math_grading import MathGrader
from sgl_lim.programs.problems import Kind, Problem
from sgl_lim.programs.run_records import Generation
from sgl_lim.tasks.chains import matching_words

_T = TypeVar("_T", bound=Hashable)


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
    by_spelling: bool = False  # the answer was too costly to compute, so that it equals nothing but its own spelling


@dataclass(frozen=True)
class ItemGrade:
    """All generations of one problem: one for solve, several and their vote for self-consistency."""

    answer: str | None
    correct: bool
    samples: tuple[SampleGrade, ...]


def majority(votes: Sequence[_T | None], same: Callable[[_T, _T], bool], text: Callable[[_T], str] = str) -> _T | None:
    """The most frequent vote, whatever the order of the votes. None casts no vote.

    Votes that are the same, or the same as a third one, go together. The group speaks by its most frequent spelling.
    Of equally large groups one is drawn by the digest of that spelling, so that no kind of answer has an advantage.

    Args:
        votes: in any order.
        same: whether two votes are for one answer; symmetric.
        text: the spelling of a vote.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    groups: list[list[_T]] = []
    for vote in sorted(counts, key=text):
        joined = [group for group in groups if any(same(member, vote) for member in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([member for group in joined for member in group] + [vote])
    spoken = [
        (sum(counts[vote] for vote in group), min(group, key=lambda vote: (-counts[vote], len(text(vote)), text(vote))))
        for group in groups
    ]
    return max(spoken, key=lambda group: (group[0], sha256(text(group[1]).encode()).digest()))[1] if spoken else None


def grade(
    problem: Problem,
    generations: Sequence[Generation],
    grader: Grader,
    stopped: Callable[[], bool] = lambda: False,
) -> ItemGrade:
    """Grade the generations of one problem and their majority vote (of one generation: itself).

    Args:
        problem: with the right answer.
        generations: of this problem.
        grader: of its kind.
        stopped: whether the run is to end, asked while something takes long.

    Raises:
        GradingError: the problem's own answer cannot be understood.
        GradingStopped: `stopped()` became true while answers were compared.
    """
    expected, comparison = grader.expected(problem), grader.comparison(stopped)
    answers = [grader.extract(generation) for generation in generations]
    # Each answer before any pair, and by spelling: where the time for a problem ends must not depend on the order.
    right = {answer for answer in sorted(_given(answers), key=_text) if comparison.same(expected, answer)}
    voted = majority(answers, comparison.same, _text)
    return ItemGrade(
        answer=None if voted is None else voted.text,
        correct=voted in right,
        samples=tuple(
            _grade_sample(problem, generation.text, answer, answer in right, comparison)
            for generation, answer in zip(generations, answers, strict=True)
        ),
    )


def _given(answers: Sequence[Answer | None]) -> set[Answer]:
    return {answer for answer in answers if answer is not None}


def _text(answer: Answer) -> str:
    return answer.text


def _grade_sample(
    problem: Problem, text: str, answer: Answer | None, correct: bool, comparison: Comparison
) -> SampleGrade:
    given = None if answer is None else answer.text
    if problem.solution is None:
        return SampleGrade(given, correct, by_spelling=answer is not None and comparison.by_spelling(answer))
    matching, total = matching_words(text, problem.solution)
    return SampleGrade(given, correct, text.split() == problem.solution.split(), matching, total)
