"""How often the grader of the programs is right: `python -m benchmarks.grading --data-dir DIR`.

Every answer of AIME-24, AIME-25 and MATH-500 is put into each of twelve forms that models write, and has to be graded
right. Random pairs of different answers must not be accepted for each other. Thirty-two answers that nobody should
compute are graded as the samples of one problem, on the clock. Exit code 1 if a figure misses its mark.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sgl_lim import command
from sgl_lim.programs.builtin_problems import BUILTIN, builtin_problems
from sgl_lim.programs.graders import Grader
from sgl_lim.programs.grading import grade, make_grader
from sgl_lim.programs.problems import Problem, ProblemError
from sgl_lim.programs.run_records import Generation

FORMS: dict[str, Callable[[str], str]] = {
    "box": lambda answer: f"Adding up, we get $\\boxed{{{answer}}}$.",
    "space before the brace": lambda answer: f"\\boxed {{{answer}}}",
    "fbox": lambda answer: f"So it is \\fbox{{{answer}}}",
    "answer tag": lambda answer: f"<think>Hm.</think><answer>{answer}</answer>",
    "final dot": lambda answer: f"\\[ \\boxed{{{answer}.}} \\]",
    "bold Markdown": lambda answer: f"The final answer is **{answer}**.",
    "plain sentence": lambda answer: f"The final answer is {answer}.",
    "formula": lambda answer: f"**Final Answer**\n\n$${answer}$$",
    "boldsymbol": lambda answer: f"\\boxed{{\\boldsymbol{{{answer}}}}}",
    "colour": lambda answer: f"\\boxed{{\\textcolor{{blue}}{{{answer}}}}}",
    "invisible characters": lambda answer: f"\\boxed{{\u200b\u00a0{answer}\ufeff}}",
    "after a draft": lambda answer: f"Perhaps \\boxed{{-987}}.</think>No: \\boxed{{{answer},}}",
}

COSTLY: tuple[str, ...] = (
    *(f"{a}^{{{b}^{{{c}}}}}" for a, b, c in [(2, 3, 40), (9, 9, 9), (7, 8, 9), (10, 10, 10), (3, 5, 21), (99, 99, 99)]),
    *(f"{a}^{{{a}^{{{a}^{{{a}}}}}}} + 1" for a in (5, 6, 7, 8)),
    "(10^9)!",
    "((20!)!)!",
    "2000000!",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\binom{1000000}{500000}",
    r"\sum_{k=1}^{10^9} \frac{1}{k}",
    r"\prod_{k=1}^{10^7} k",
    r"\int_0^1 \sin(\sin(\sin(x^{x^{x}}))) dx",
    r"\int \frac{dx}{x^{10}+x^7+3x+11}",
    r"\lim_{x \to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^7}",
    "(x+y+z+w)^{5000}",
    r"\sqrt[3]{" * 30 + "2" + "}" * 30,
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    "(" * 500 + "1" + ")" * 500,
    "9" * 3000 + "^{" + "9" * 50 + "}",
    "1+" * 900 + "1",
    "2^{" * 60 + "2" + "}" * 60,
    r"\log_{2^5}(\log_{2^4}(\log_{2^3}(10^{10^{10}})))",
    "10^{10^8} + 1",
    r"2^{10^9} \bmod 1000",
    r"x^{x^{x^{x^{x}}}}",
    r"\sum_{n=1}^{\infty} \frac{\sin n}{n^3 \sin(n^2)}",
)

_FORMS_MARK, _COSTLY_SECONDS = 0.995, 10.0


def is_right(expected: str, text: str, grader: Grader) -> bool:
    """Whether a generation that ended by itself counts as right."""
    return grade(Problem("p", "?", expected, "math"), [generation(text)], grader).correct


def generation(text: str) -> Generation:
    """One that ended by itself."""
    return Generation(text, 1, 1, 0, "stop")


def misread(answers: Iterable[str], grader: Grader) -> list[tuple[str, str]]:
    """Forms and answers that are not graded right."""
    pairs = itertools.product(FORMS, answers)
    return [(form, answer) for form, answer in pairs if not is_right(answer, FORMS[form](answer), grader)]


def accepted(answers: Sequence[str], count: int, seed: int, grader: Grader) -> list[tuple[str, str]]:
    """Of `count` random pairs of answers that are spelled differently, those that are graded as one; each once."""
    draw = random.Random(seed)
    drawn = {tuple(draw.sample(answers, 2)) for _ in range(count)}
    return [(one, other) for one, other in sorted(drawn) if is_right(one, f"\\boxed{{{other}}}", grader)]


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="holds aime2024.jsonl … (default: the hub)")
    parser.add_argument("--pairs", type=int, default=100_000, metavar="N", help="random pairs (default: %(default)s)")
    args = parser.parse_args()
    try:
        answers = [problem.answer for name in BUILTIN for problem in builtin_problems(name, args.data_dir).problems]
    except ProblemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    grader = make_grader("math")
    print(f"grader: {grader.name}; {len(answers)} answers, {len(set(answers))} spellings")
    missed = misread(answers, grader)
    share = 1 - len(missed) / (len(FORMS) * len(answers))
    for form in FORMS:
        count = sum(name == form for name, _ in missed)
        print(f"  {form:<24} {len(answers) - count} of {len(answers)} right")
    for form, answer in missed:
        print(f"  missed: {form}: {answer}")
    print(f"forms: {share:.2%} right (at least {_FORMS_MARK:.1%})", flush=True)
    started = time.monotonic()
    grade(Problem("p", "?", "204", "math"), [generation(f"\\boxed{{{text}}}") for text in COSTLY], grader)
    seconds = time.monotonic() - started
    print(f"costly: {len(COSTLY)} samples in {seconds:.1f} s (at most {_COSTLY_SECONDS:.0f} s)", flush=True)
    equal = accepted(sorted(set(answers)), args.pairs, 0, grader)
    print(
        f"pairs: {len(equal)} of {args.pairs} random pairs of different spellings are accepted (to be equal, or wrong):"
    )
    for one, other in equal:
        print(f"  {one}  =  {other}")
    return 0 if share >= _FORMS_MARK and seconds <= _COSTLY_SECONDS else 1


if __name__ == "__main__":
    command.run(main)
