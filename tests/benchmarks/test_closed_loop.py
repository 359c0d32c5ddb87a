"""The client counts tokens however a stream is cut, keeps as many requests running as asked, and stops in time."""

import json
from typing import Any

import pytest
from streaming_endpoint import StreamingEndpoint

from benchmarks.closed_loop import ChunkReader, LoadError, random_prompts, random_requests, run_load
from benchmarks.figures import figures
from support.waiting import wait_until


def event(tokens: int, **more: Any) -> bytes:
    body = {**more, "output_ids": [7], "meta_info": {"id": "a", "completion_tokens": tokens, "cached_tokens": 99}}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def test_reader_counts_alike_wherever_the_stream_is_cut() -> None:
    events = {1: event(1, text="a"), 2: event(2), 13: event(13)}
    stream = b"".join(events.values()) + b"data: [DONE]\n\n"
    ends = {sum(map(len, list(events.values())[: n + 1])): tokens for n, tokens in enumerate(events)}
    for cut in range(len(stream)):
        reader = ChunkReader()
        before = max((tokens for end, tokens in ends.items() if end <= cut), default=None)
        assert reader.feed(stream[:cut]) == before
        assert reader.feed(stream[cut:]) == (None if before == 13 else 13)
    reader = ChunkReader()
    one_by_one = [count for i in range(len(stream)) if (count := reader.feed(stream[i : i + 1])) is not None]
    assert one_by_one == [1, 2, 13]


def test_reader_ignores_counts_that_the_model_writes() -> None:
    assert ChunkReader().feed(event(3, text='"completion_tokens":77')) == 3


def test_reader_raises_on_an_error_event() -> None:
    error = b'data: {"error":{"message":"too long"}}\n\n'
    for before in (b"", event(3)):
        with pytest.raises(LoadError, match="too long"):
            ChunkReader().feed(before + error)


def test_prompts_are_distinct_repeatable_and_in_range() -> None:
    prompts = random_prompts(3, 50, (12, 20), seed=1)
    assert prompts == random_prompts(3, 50, (12, 20), seed=1) != random_prompts(3, 50, (12, 20), seed=2)
    assert prompts[0] != prompts[1]
    assert {token for prompt in prompts for token in prompt} == set(range(12, 20))


def test_a_loop_under_way_begins_where_its_requests_would_be() -> None:
    requests = random_requests(6, 5, 40, (12, 20), seed=1, underway=4)
    assert sorted(r.output_len for r in requests[:4]) == [10, 20, 30, 40]
    assert all(len(r.prompt) + r.output_len == 45 for r in requests)
    assert [r.output_len for r in requests[4:]] == [40, 40]
    assert [r.output_len for r in requests[:4]] != sorted(r.output_len for r in requests[:4])
    assert all(r.output_len == 40 and len(r.prompt) == 5 for r in random_requests(3, 5, 40, (12, 20), seed=1))


def test_load_keeps_as_many_running_as_asked(stub: StreamingEndpoint) -> None:
    stub.per_chunk = 4
    run = run_load(stub.url, random_requests(7, 5, 10, (12, 99), 0), concurrency=3)
    assert stub.most_running == 3
    assert run.complete and len(run.generations) == 7
    assert all(g.tokens[-1] == 10 and g.ended is not None for g in run.generations)
    assert [request["input_ids"] for request in stub.streamed[:3]] != [stub.streamed[0]["input_ids"]] * 3
    assert all(request["sampling_params"]["ignore_eos"] for request in stub.streamed)


def test_time_limit_aborts_and_begins_nothing_new(stub: StreamingEndpoint) -> None:
    stub.pause = 0.02
    run = run_load(stub.url, random_requests(9, 5, 500, (12, 99), 0), concurrency=3, time_limit=1.0)
    assert not run.complete
    assert len(run.generations) == 3 and all(g.ended is None for g in run.generations)
    wait_until(lambda: stub.closed_by_client == 3, "all three clients have gone")
    result = figures(run, concurrency=3)
    received = sum(g.tokens[-1] for g in run.generations)
    assert 3 <= received < 1500
    assert result.tokens_per_s == pytest.approx(received / (run.ended - run.begun))
    assert (result.done, result.mean_output, result.complete) == (0, None, False)
    assert result.steady_tokens_per_s is not None and result.ttft_ms is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": lambda number, wanted: wanted - (number == 2)}, "ended after 9 of 10 tokens"),
        ({"status": 400}, "HTTP 400.*refused"),
        ({"error": "out of memory"}, "out of memory"),
    ],
    ids=["short answer", "http status", "error event"],
)
def test_load_fails_with_any_of_its_requests(stub: StreamingEndpoint, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(stub, name, value)
    with pytest.raises(LoadError, match=message):
        run_load(stub.url, random_requests(4, 5, 10, (12, 99), 0), concurrency=2)
