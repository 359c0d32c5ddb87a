"""Where a generation's answer stands, and texts that make bad patterns slow."""

import pytest

from sgl_lim.programs.answer_forms import read
from sgl_lim.programs.answer_text import answer_text
from sgl_lim.programs.thinking_tags import after_thinking, opens_thinking


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("Solve it.<|im_start|>assistant\n<think>\n", True),
        ("Solve it. [THINK]", True),
        ("Solve it.<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("What does <think> mean?<|im_start|>assistant\n", False),
        ("<think>" * 1000 + "?", False),
        ("", False),
    ],
)
def test_whether_a_prompt_opens_the_thinking(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) is opened


def test_what_stands_after_the_thinking() -> None:
    assert after_thinking("a</think>b", opened=True) == "b"
    assert after_thinking("a</think>b", opened=False) == "b"
    assert after_thinking("a</think> \n", opened=True) == " \n"
    assert after_thinking("a</think> \n", opened=False) == "a"
    assert after_thinking("a", opened=True) is None
    assert after_thinking("<think>a", opened=False) is None
    assert after_thinking("the tag <think> is not used", opened=False) == "the tag <think> is not used"
    assert after_thinking("<think>a</think>b\n<think>c</think>d", opened=False) == "b\nd"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1}, \boxed{2", None),
        ("The answer is 3.5.", "3.5"),
        ("The answer is $x=2$, of course.", "x=2"),
        ("The answer to this is not known.", None),
        ("There are **12** of them.", "12"),
        ("I saw 12 of them.", None),
        ("12", "12"),
    ],
)
def test_the_answer_as_it_is_written(text: str, answer: str | None) -> None:
    assert answer_text(text, finish_reason="stop", thinking_opened=False) == answer
    assert answer_text(text, finish_reason="length", thinking_opened=False) is None


@pytest.mark.timeout(60)  # quadratic ones take minutes
@pytest.mark.parametrize(
    "unit",
    [
        *[
            "<think>",
            "<think>\n",
            "</think>",
            "<think>a</think>\n",
            r"\boxed{}",
            r"is \boxed{}",
            r"\boxed{",
            "<answer>",
        ],
        *["answer is ", "*", "_", "**1** ", "\n ", "$", "< ", "{", "\\", "1 ", "ab ", "therefore ", "7", ". "],
    ],
)
def test_no_text_of_repetitions_is_slow(unit: str) -> None:
    text = unit * (400_000 // len(unit))
    for opened in (False, True):
        found = answer_text(text, finish_reason="stop", thinking_opened=opened)
        read(found or "")
    opens_thinking(text)
    read(text[:999])
