"""Which load the command line of benchmarks/throughput.py means."""

import pytest

from benchmarks import throughput
from benchmarks.load_spec import LoadSpec, fitting_concurrency, parse_load


def loads(*argv: str) -> list[LoadSpec]:
    found: list[LoadSpec] = throughput.parse_arguments(["a=http://x", *argv]).loads
    return found


def test_loads_are_taken_in_the_order_given() -> None:
    found = loads(
        *("--load", "input=512,output=16384,concurrency=64,requests=128,time_limit=52.5,underway"),
        *("--load", "output=2,input=1"),
    )
    assert found == [LoadSpec(512, 16384, 64, 128, 52.5, underway=True), LoadSpec(1, 2)]


def test_flags_describe_the_one_load_without_load() -> None:
    assert loads() == [LoadSpec(3600, 512)]
    assert loads("--input-len", "7", "--concurrency", "auto") == [LoadSpec(7, 512)]
    given = ["--output-len", "8", "--concurrency", "3", "--requests", "5", "--time-limit", "2", "--underway"]
    assert loads(*given) == [LoadSpec(3600, 8, 3, 5, 2.0, underway=True)]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--load", "input=512"], "--load: 'input=512': output missing"),
        (["--load", "underway"], "input and output missing"),
        (["--load", "input=1,output=1,request=2"], "unknown key 'request'; known are input, output, concurrency"),
        (["--load", "input=1,output=1,"], "unknown key ''"),
        (["--load", "input=0,output=1"], "--load: 'input=0,output=1': input: expected a whole number above 0, got '0'"),
        (["--load", "input=1,output"], "output: expected a whole number above 0, got ''"),
        (["--load", "input=1,output=1,requests=2.5"], "requests: expected a whole number above 0, got '2.5'"),
        (["--load", "input=1,output=1,time_limit=nan"], "time_limit: expected seconds above 0, got 'nan'"),
        (["--load", "input=1,output=1,time_limit=soon"], "time_limit: expected seconds above 0, got 'soon'"),
        (["--load", "input=1,output=1,input=2"], "input is given twice"),
        (["--load", "input=1,output=1,underway=yes"], "underway: takes no value, got 'yes'"),
        (["--load", "input=1,output=1", "--input-len", "3600"], "--input-len and --load exclude each other"),
        (["--underway", "--concurrency", "auto", "--load", "input=1,output=1"], "--concurrency, --underway and --load"),
        (["--input-len", "x"], "--input-len: expected a whole number above 0, got 'x'"),
    ],
)
def test_wrong_loads_say_what_is_wrong(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loads(*argv)
    assert said in capsys.readouterr().err


def test_a_load_is_written_as_it_is_read() -> None:
    for load in (LoadSpec(1234567, 2), LoadSpec(1, 2, 3, 4, 5.25, underway=True)):
        assert parse_load(str(load)) == load
    assert str(parse_load("input=1,output=2,concurrency=auto")) == "input=1,output=2"


def test_sizes_that_are_not_given_fit_the_server() -> None:
    info = {"max_total_num_tokens": 1010, "page_size": 1, "internal_states": [{}]}
    assert LoadSpec(60, 40).sizes(info) == (10, 10)
    assert LoadSpec(60, 40, underway=True).sizes(info) == (10, 20)
    assert LoadSpec(60, 40, concurrency=3, requests=7).sizes(info) == (3, 7)
    assert LoadSpec(60, 40, requests=4).sizes(info) == (4, 4)


@pytest.mark.parametrize(
    ("pool", "page", "running", "groups", "expected"),
    [
        (1010, 1, 64, 1, 10),  # each takes 100 tokens and a page
        (1009, 1, 64, 1, 9),
        (50, 1, 64, 1, 1),
        (10_000, 1, 8, 1, 8),
        (1280, 16, 64, 1, 10),  # 100 tokens are 7 pages
        (1010, 1, 64, 2, 20),
        (1010, 1, None, 1, 10),
    ],
)
def test_auto_concurrency_fills_the_pool(pool: int, page: int, running: int | None, groups: int, expected: int) -> None:
    states = [{"effective_max_running_requests_per_dp": running}] * groups
    info = {"max_total_num_tokens": pool, "page_size": page, "internal_states": states}
    assert fitting_concurrency(info, 60, 40) == expected
