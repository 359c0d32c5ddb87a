"""benchmarks/throughput.py against a stub endpoint: does it count, time, check and clean up as it says?"""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from streaming_endpoint import StreamingEndpoint

from benchmarks import throughput
from benchmarks.bench_client import read_result, run_bench_serving
from benchmarks.closed_loop import LoadError
from sgl_lim.programs import server_process

MACHINE_LINE_APART = throughput.machine_line_apart
COUNTERS = ("decode_steps", "tokens_attended", "tokens_dense", "selections", "requests", "requests_dense")
QUICK = ["--input-len", "60", "--output-len", "40", "--check", "2", "--check-len", "12", "4"]
RESULT = {
    "completed": 4,
    "total_output_tokens": 400,
    "output_throughput": 123.0,
    "median_ttft_ms": 5.0,
    "p99_ttft_ms": 6.0,
    "median_tpot_ms": 7.0,
    "p99_tpot_ms": 8.0,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the import of torch that each machine line costs."""
    monkeypatch.setattr(throughput, "machine_line_apart", lambda: "some machine")


def launch_with(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(server_process, "LAUNCHER", ("-c", script))


def test_a_server_that_does_not_start_shows_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_with(monkeypatch, "import sys; print('unknown flags', sys.argv[1:]); sys.exit(3)")
    output = tmp_path / "rows.csv"
    options = ["--logs", str(tmp_path), "--output", str(output), "--common=--model-path m"]
    assert throughput.main(["--server", "a=--no-such-flag", "--server", "b=--other", *options]) == 1
    shown = capsys.readouterr()
    assert "a: the server ended with 3" in shown.err and "unknown flags" in shown.err
    assert "'--model-path', 'm', '--incremental-streaming-output', '--no-such-flag'" in shown.err
    assert "starting b" not in shown.err  # without a baseline
    assert not shown.out and not output.exists()


@pytest.mark.parametrize("how", ["flag", "SGLANG_API_KEY", "OPENAI_API_KEY"])
def test_a_protected_server_is_measured(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SGLANG_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "kept" if name == how else "")  # what the flag sets is taken back, too
    output = tmp_path / "rows.csv"
    with StreamingEndpoint(api_key="kept") as server:
        argv = [f"a={server.url}", *QUICK, "--output", str(output)]
        assert throughput.main([*argv, *(["--api-key", "kept"] if how == "flag" else [])]) == 0
        monkeypatch.setenv("SGLANG_API_KEY", "wrong")
        assert throughput.main(argv) == 1
    shown = capsys.readouterr()
    assert "HTTP 401" in shown.err and "--api-key" in shown.err
    assert "kept" not in output.read_text() + shown.out + shown.err


def test_a_server_that_fails_does_not_show_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_with(monkeypatch, "import sys; print('arguments', sys.argv[1:]); sys.exit(3)")
    argv = ["--server", "a=--api-key kept --admin-api-key=hidden", "--logs", str(tmp_path)]
    assert throughput.main(argv) == 1
    said = capsys.readouterr().err
    assert "'--api-key', '…'" in said and "kept" not in said and "hidden" not in said


def test_rows_compare_with_the_first_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "rows.csv"
    with StreamingEndpoint(pause=0.02) as slow, StreamingEndpoint(pause=0.005) as fast:
        fast.counters = dict.fromkeys(COUNTERS, 0)
        arguments = [f"slow={slow.url}", f"fast={fast.url}/", f"again={slow.url}", *QUICK, "--output", str(output)]
        assert throughput.main(arguments) == 0
        assert throughput.main(arguments) == 0
        # Before each load and each way of checking; then a warm-up and a wave of 8, each time.
        assert slow.flushes == 2 * (2 + 3 + 2) and len(slow.streamed) == 4 * (1 + 8)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["server"] for row in rows] == ["slow", "fast", "again"] * 2
    first, second, third = rows[:3]
    assert first["concurrency"] == second["requests"] == second["done"] == "8"  # 1000 / 101, at most 8
    assert float(first["ratio"]) == float(first["steady_ratio"]) == 1.0
    for column, value in (("ratio", "tokens_per_s"), ("steady_ratio", "steady_tokens_per_s")):
        for row in (second, third):
            assert float(row[column]) == pytest.approx(float(row[value]) / float(first[value]), abs=0.01)
        assert second[column] != "1.0"
    assert (first["attended"], second["attended"]) == ("1.0", "0.25")
    assert (second["same_answers"], second["complete"]) == ("", "yes")
    assert float(second["logits_error"]) <= float(second["logits_limit"]) < float(second["logits_control"])
    assert second["mean_output"] == "40.0" and second["kv_pool_tokens"] == "1000"
    assert (first["machine"], first["command"]) == ("some machine", "")
    table = capsys.readouterr().out
    assert table.count("\n| slow |") == 2 and table.count("| ---") >= 2


LOADS = ["--load", "input=60,output=40", "--load", "input=30,output=20,requests=3,concurrency=2", *QUICK[4:]]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_load_on_every_server_compares_with_the_first_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, written, measure = tmp_path / "rows.csv", [], throughput.measure

    def observed(*given: Any) -> Any:
        written.append(len(read_rows(output)) if output.exists() else 0)
        return measure(*given)

    monkeypatch.setattr(throughput, "measure", observed)
    with StreamingEndpoint(pause=0.02) as slow, StreamingEndpoint(pause=0.005) as fast:
        assert throughput.main([f"slow={slow.url}", f"fast={fast.url}", *LOADS, "--output", str(output)]) == 0
        for server in (slow, fast):
            assert len(server.streamed) == (1 + 8) + (1 + 3)
        # One check, in three ways on the first server and in two on the second: together, alone, as a prefill.
        assert [len(s.generate_requests) - len(s.streamed) for s in (slow, fast)] == [1 + 4 + 4, 1 + 4]
        assert (slow.flushes, fast.flushes) == (2 + 3, 2 + 2)
    assert written == [0, 1, 2, 3]
    rows = read_rows(output)
    assert [(row["server"], row["input_len"], row["requests"], row["concurrency"]) for row in rows] == [
        *(("slow", "60", "8", "8"), ("slow", "30", "3", "2")),
        *(("fast", "60", "8", "8"), ("fast", "30", "3", "2")),
    ]
    for first, second in zip(rows[:2], rows[2:], strict=True):
        assert first["ratio"] == "1.0" and first["mean_output"] == second["mean_output"]
        expected = float(second["tokens_per_s"]) / float(first["tokens_per_s"])
        assert float(second["ratio"]) == pytest.approx(expected, abs=0.01)
    table = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table == ["| server", "| ---", "| slow", "| fast", "| slow", "| fast"]


def test_a_failed_load_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    with StreamingEndpoint() as first, StreamingEndpoint() as second:
        first.length = lambda number, wanted: wanted - (wanted == 40)
        assert throughput.main([f"a={first.url}", f"b={second.url}", *LOADS, "--output", str(output)]) == 1
    shown = capsys.readouterr()
    assert "error: a: input=60,output=40: " in shown.err and "ended after 39 of 40 tokens" in shown.err
    assert [(row["server"], row["output_len"], row["ratio"] != "") for row in read_rows(output)] == [
        ("a", "20", True),
        ("b", "40", False),
        ("b", "20", True),
    ]
    assert shown.out.count("\n| b |") == 2


def test_without_any_baseline_no_further_server_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with StreamingEndpoint() as first, StreamingEndpoint() as second:
        first.length = lambda number, wanted: wanted - 1
        assert throughput.main([f"a={first.url}", f"b={second.url}", *LOADS]) == 1
        assert not second.generate_requests
    shown = capsys.readouterr()
    assert shown.err.count("error: a: ") == 2 and not shown.out


def test_rows_of_another_benchmark_are_left_alone(stub: StreamingEndpoint, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    output.write_text("server,requests\na,1\n")
    with pytest.raises(SystemExit, match="other columns"):
        throughput.main([f"a={stub.url}", *QUICK, "--requests", "1", "--output", str(output)])
    assert output.read_text() == "server,requests\na,1\n" and not stub.generate_requests


def test_the_machine_line_comes_from_another_process() -> None:
    assert "sglang" in MACHINE_LINE_APART()


def test_no_speed_for_a_server_whose_decode_is_wrong_in_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.csv"
    with StreamingEndpoint() as good, StreamingEndpoint() as bad, StreamingEndpoint() as third:
        bad.model.read = lambda row, step, context: context[1:] if row == 3 else context
        servers = [f"good={good.url}", f"bad={bad.url}", f"third={third.url}"]
        assert throughput.main([*servers, *QUICK, "--output", str(output)]) == 1
        assert not bad.streamed
        shown = capsys.readouterr()
        assert "bad: its logits are 0." in shown.err and "| bad |" not in shown.out
        assert [line.split(",")[0] for line in output.read_text().splitlines()] == ["server", "good", "third"]
        assert throughput.main([*servers[:2], *QUICK, "--check", "0"]) == 0


def test_the_check_stays_inside_the_budget(stub: StreamingEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    stub.counters = dict.fromkeys(COUNTERS, 0)
    arguments = [f"a={stub.url}", *QUICK[:4], "--requests", "1"]
    assert throughput.main([*arguments, "--check-len", "200", "56"]) == 1
    assert "sums to 257 tokens with the first one, but beyond 256" in capsys.readouterr().err
    assert throughput.main([*arguments, "--check-len", "200", "55"]) == 0


def test_long_repeated_answers_are_warned_of(stub: StreamingEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    stub.pause, stub.per_chunk = 0.0, 500
    arguments = [f"a={stub.url}", "--input-len", "60", "--output-len", "2000", "--requests", "1"]
    assert throughput.main(arguments) == 0
    assert "repeats the answer in each chunk" in capsys.readouterr().err
    stub.info = {"incremental_streaming_output": True}
    assert throughput.main(arguments) == 0
    assert "repeats" not in capsys.readouterr().err


def test_servers_to_start_take_common_and_own_arguments() -> None:
    args = throughput.parse_arguments(["--server", "a=--x 1 --y 'b c'", "--server", "d=--z=2", "--common=--m n"])
    increments = "--incremental-streaming-output"
    assert args.targets[0].arguments == ("--m", "n", increments, "--x", "1", "--y", "b c")
    assert args.targets[1].arguments == ("--m", "n", increments, "--z=2")
    assert server_process.launch_command(args.targets[0].arguments).startswith("python -m sglang.launch_server --m n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["a=http://x", "--server", "b=--y"],
        ["a=http://x", "a=http://y"],
        ["http://x"],
        ["a=http://x", "--client", "bench_serving", "--time-limit", "3"],
        ["a=http://x", "--client", "bench_serving", "--underway"],
        ["a=http://x", "--client", "bench_serving", "--load", "input=1,output=1,time_limit=3"],
        [
            "a=http://x",
            "--client",
            "bench_serving",
            "--load",
            "input=1,output=1",
            "--load",
            "input=1,output=1,underway",
        ],
        ["a=http://x", "--concurrency", "0"],
        ["a=http://x", "--check", "1"],
    ],
)
def test_command_lines_that_say_nothing_clear_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        throughput.parse_arguments(argv)
    assert refused.value.code == 2


def test_bench_serving_result_becomes_figures() -> None:
    result = read_result(RESULT, requests=4, output_len=100)
    assert (result.tokens_per_s, result.ttft_ms, result.tpot_ms) == (123.0, (5.0, 6.0), (7.0, 8.0))
    assert (result.done, result.mean_output, result.steady_tokens_per_s) == (4, 100, None)


@pytest.mark.parametrize("change", [{"completed": 3}, {"total_output_tokens": 399}])
def test_bench_serving_result_with_less_than_asked_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(LoadError, match="bench_serving reports"):
        read_result(RESULT | change, requests=4, output_len=100)


def test_bench_serving_is_refused_without_a_tokenizer() -> None:
    sizes = {"concurrency": 1, "requests": 1, "input_len": 1, "output_len": 1, "seed": 0, "warmup": 0}
    with pytest.raises(LoadError, match="skip-tokenizer-init"):
        run_bench_serving("http://127.0.0.1:1", {"skip_tokenizer_init": True, "model_path": os.devnull}, **sizes)
