"""Votes, chains and mathematics."""

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_lim.programs.grading import (
    ChainGrader,
    GradingError,
    MathGrader,
    NeedleGrader,
    grade,
    majority,
    make_grader,
)
from sgl_lim.programs.problems import Problem, jsonl_problems
from sgl_lim.tasks.chains import make_chain

ANSWER_FORMS = Path(__file__).parent / "data" / "answer_forms.jsonl"
"""Answers as AIME and MATH-500 write them, with another spelling of each."""


def chain_problem() -> Problem:
    chain = make_chain(random.Random(1), num_facts=12, num_steps=3)
    return Problem("c", chain.prompt, chain.answer, "chain", chain.solution)


def math_problem(answer: str) -> Problem:
    return Problem("m", "?", answer, "math")


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["1", "2"], "1"),
        (["2", "1", "1", "2"], "2"),
        ([None, None, "3"], "3"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority(votes: list[str | None], winner: str | None) -> None:
    assert majority(votes, str.__eq__) == winner


@given(st.lists(st.sampled_from([None, "a", "b", "c"])))
def test_no_answer_has_more_votes_than_the_majority(votes: list[str | None]) -> None:
    cast = [vote for vote in votes if vote is not None]
    winner = majority(votes, str.__eq__)
    assert (winner is None) == (not cast)
    assert all(cast.count(vote) <= cast.count(str(winner)) for vote in cast)


def test_votes_are_compared_by_meaning() -> None:
    assert majority(["0.5", "3", "1/2", ".50"], lambda a, b: eval(a) == eval(b)) == "0.5"


def test_a_right_chain() -> None:
    problem = chain_problem()
    assert problem.solution is not None
    graded = grade(problem, [problem.solution], ChainGrader())
    (sample,) = graded.samples
    assert graded.correct and sample.correct and sample.whole_chain
    assert graded.answer == problem.answer
    assert sample.words_matching == sample.words_total == len(problem.solution.split())


def test_a_right_answer_after_a_wrong_step_is_right_but_no_whole_chain() -> None:
    problem = chain_problem()
    assert problem.solution is not None
    words = problem.solution.split()
    words[0] = "v399" if words[0] != "v399" else "v398"
    (sample,) = grade(problem, [" ".join(words)], ChainGrader()).samples
    assert sample.correct and not sample.whole_chain
    assert sample.words_matching == len(words) - 1


def test_a_chain_that_goes_on_is_no_whole_chain() -> None:
    problem = chain_problem()
    (sample,) = grade(problem, [f"{problem.solution} ;"], ChainGrader()).samples
    assert sample.correct and not sample.whole_chain


def test_a_chain_that_was_cut_off_has_no_answer() -> None:
    problem = chain_problem()
    assert problem.solution is not None
    graded = grade(problem, [problem.solution.rpartition("answer")[0]], ChainGrader())
    assert graded.answer is None and not graded.correct and graded.samples[0].answer is None


def test_the_vote_decides_and_the_samples_keep_their_own_grades() -> None:
    problem = chain_problem()
    wrong = str((int(problem.answer) + 1) % 100)
    texts = [f"answer {n}" for n in (wrong, problem.answer, problem.answer)]
    graded = grade(problem, texts, ChainGrader())
    assert graded.correct and [sample.correct for sample in graded.samples] == [False, True, True]
    assert not grade(problem, [f"answer {wrong}", f"answer {problem.answer}"], ChainGrader()).correct


def test_a_needle_is_the_first_number() -> None:
    problem = Problem("n", "?", "48213", "needle")
    grader = make_grader("needle")
    assert isinstance(grader, NeedleGrader)
    texts = [" The access code is 48213. That of the teapot is 5.", "48214", "No idea."]
    graded = grade(problem, texts, grader)
    assert [sample.correct for sample in graded.samples] == [True, False, False]
    assert [sample.answer for sample in graded.samples] == ["48213", "48214", None]


def test_without_math_verify_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(GradingError, match=r"pip install 'math-verify>=0\.9,<1'"):
        make_grader("math")
    make_grader("chain")


@pytest.fixture(scope="module")
def math_grader() -> MathGrader:
    pytest.importorskip("math_verify", reason="needs math-verify")
    return MathGrader()


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    [
        ("204", "so it is \\boxed{204}.", True),
        ("070", "\\boxed{70}", True),
        ("204", "\\boxed{205}", False),
        ("\\frac{1}{2}", "The probability is \\boxed{0.5}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\frac{\\pi}{2})}", True),
        ("4", "<think>maybe \\boxed{3}</think> \\boxed{4}", True),
        ("4", "<think>surely \\boxed{4}", False),
        ("4", "surely \\boxed{4}</think> \\boxed{3}", False),
        ("4", "", False),
    ],
)
def test_mathematics(math_grader: MathGrader, answer: str, text: str, correct: bool) -> None:
    assert grade(math_problem(answer), [text], math_grader).correct is correct


def test_equal_mathematical_answers_vote_together(math_grader: MathGrader) -> None:
    texts = ["\\boxed{3}", "\\boxed{\\frac{1}{2}}", "\\boxed{3}", "\\boxed{0.5}", "\\boxed{\\frac{2}{4}}"]
    graded = grade(math_problem("1/2"), texts, math_grader)
    assert graded.correct
    assert graded.samples[0].whole_chain is None and graded.samples[0].words_total is None


def test_an_answer_that_cannot_be_read_is_refused(math_grader: MathGrader) -> None:
    with pytest.raises(GradingError, match=r"'m'.*text"):
        math_grader.expected(math_problem("\\text{}"))


def test_every_form_of_answer_is_read_in_either_spelling_and_equals_no_other(math_grader: MathGrader) -> None:
    problems = jsonl_problems(ANSWER_FORMS).problems
    spellings = [json.loads(line)["also"] for line in ANSWER_FORMS.read_text().splitlines()]
    for problem, other, also in zip(problems, problems[1:] + problems[:1], spellings, strict=True):
        for text, right in ((problem.answer, True), (also, True), (other.answer, False)):
            graded = grade(problem, [f"Thus \\boxed{{{text}}}."], math_grader)
            assert graded.correct is right, (problem.answer, text)
