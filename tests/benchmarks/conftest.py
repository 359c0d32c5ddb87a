"""Benchmarks are scripts beside one another: their folder is on the path as when one of them runs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from streaming_endpoint import StreamingEndpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def stub() -> Iterator[StreamingEndpoint]:
    with StreamingEndpoint() as endpoint:
        yield endpoint
