"""Fixtures of the programs' tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from stub_endpoint import StubEndpoint

from sgl_lim.programs.math_grading import MathGrader
from sgl_lim.programs.run_records import Row, Sample


@pytest.fixture(scope="session")
def math_grader() -> MathGrader:
    pytest.importorskip("math_verify", reason="needs math-verify")
    return MathGrader()


@pytest.fixture
def stub() -> Iterator[StubEndpoint]:
    with StubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def settings() -> dict[str, Any]:
    return {
        "model": "m",
        "program": "solve",
        "samples": None,
        "max_tokens": 72,
        "problems": {"source": "chains", "seed": 0},
    }


@pytest.fixture
def make_row(settings: dict[str, Any]) -> Any:
    def make(identity: str, *, correct: bool = True, error: str | None = None, tokens: tuple[int, ...] = (10,)) -> Row:
        if error is not None:
            return Row(identity, "7", settings, seconds=0.0, error=error)
        samples = tuple(Sample("answer 7", 100, n, 50, "stop", "7", correct, correct, n - 1, n) for n in tokens)
        return Row(identity, "7", settings, seconds=1.5, answer="7", correct=correct, samples=samples)

    return make
