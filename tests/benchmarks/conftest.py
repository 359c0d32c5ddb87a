"""An endpoint for benchmarks to measure."""

from collections.abc import Iterator

import pytest
from streaming_endpoint import StreamingEndpoint


@pytest.fixture
def stub() -> Iterator[StreamingEndpoint]:
    with StreamingEndpoint() as endpoint:
        yield endpoint
