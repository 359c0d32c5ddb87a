"""The demo with stub endpoints in place of servers."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sgl_lim.programs import demo, server_process

ROOT = Path(__file__).parents[2]
# A server that is ready, and answers every chain with its solution, or never.
SERVER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import stub_endpoint
from sgl_lim.programs import server_process
from sgl_lim.tasks.chains import generate_chains
from sgl_lim.programs.problems import needle_problems
solutions = {p.prompt: p.solution for p in generate_chains(1, num_facts=330, num_steps=4, seed=0)}
needles = needle_problems(2, sentences=130, keys=1, seed=0, chat=True).problems
def answer(prompt):
    code = next((needle.answer for needle in needles if needle.prompt in prompt), None)
    return solutions.get(prompt) or code or time.sleep(600)
class Handler(stub_endpoint._Handler):
    endpoint = stub_endpoint.StubEndpoint(answer=answer)
    def do_GET(self):
        self._send(200, {}) if self.path == "/health_generate" else super().do_GET()
if "lessismore" in sys.argv:
    Handler.endpoint.counters = dict.fromkeys(stub_endpoint.COUNTERS, 0)
print(os.getpid(), flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
stub_endpoint.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
QUICK = ["--problems", "1", "--samples", "2", "--steps", "4"]


@pytest.fixture(autouse=True)
def stub_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server_process, "LAUNCHER", ("-c", SERVER, str(Path(__file__).parent)))
    monkeypatch.setattr(demo, "LINE_EVERY_S", 0.2)


def running(folder: Path) -> list[int]:
    """Process ids of the stub servers that run."""
    pids = [int(log.read_text().split()[0]) for log in folder.glob("*/*.log")]
    assert len(pids) == 2
    return [p.pid for p in psutil.process_iter() if p.pid in pids and server_process.is_running(p)]


def test_the_demo_compares_two_servers_and_ends_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(QUICK) == 0
    shown = capsys.readouterr()
    rows = {line.split()[0]: line for line in shown.out.splitlines()[1:]}
    assert rows["dense"].count("100.0%") >= 3 and "25.0%" not in rows["dense"] and "25.0%" in rows["lessismore"]
    assert "both servers are starting: 0 s" in shown.err
    assert not running(tmp_path)


def test_a_failed_run_is_shown_and_the_servers_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--steps", "331"]) == 1
    assert "error: dense: the problems could not be solved (2)" in capsys.readouterr().err
    assert not running(tmp_path)


def test_the_public_model_is_asked_for_needles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "ensure", lambda name: tmp_path / name)
    assert demo.main(["--model", "smollm2", "--problems", "2", "--budget", "64"]) == 0
    shown = capsys.readouterr()
    assert f"--model-path {tmp_path / 'smollm2'}" in shown.err and "2 problems: a code hidden" in shown.err
    rows = {line.split()[0]: line for line in shown.out.splitlines()[1:]}
    # The stub's answers are the right codes.
    assert rows["dense"].count("100.0%") >= 2 and rows["lessismore"].count("100.0%") >= 2


def test_a_checkpoint_that_cannot_be_had_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(name: str) -> Path:
        raise demo.CheckpointError(f"{name}: no network")

    monkeypatch.setattr(demo, "ensure", ensure)
    assert demo.main(["--model", "smollm2"]) == 1
    assert "error: smollm2: no network" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "smollm2", "--samples", "2"],
        ["--model", "smollm2", "--steps", "2"],
        ["--samples", "1"],
        ["--problems", "0"],
        ["--steps", "many"],
        ["--budget", "-1"],
    ],
)
def test_wrong_arguments_are_refused_before_a_server_starts(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(argv)
    assert not list(tmp_path.iterdir())


def test_it_says_where_to_run_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        demo.main(QUICK)
    assert "run this from a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        f"import sys; from sgl_lim.programs import demo, server_process\n{_patches()}sys.exit(demo.main({HANGS!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("dense: 1 s"):
                break
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) == 3 and len(running(tmp_path)) == 2
        process.send_signal(number)
        assert process.wait(120) == 128 + number
        assert not running(tmp_path) and not any(map(server_process.is_running, tree))
    finally:
        process.kill()
        process.wait()


HANGS = ["--problems", "1", "--samples", "2", "--steps", "5"]


def _patches() -> str:
    return f"server_process.LAUNCHER = {server_process.LAUNCHER!r}\ndemo.LINE_EVERY_S = 0.2\n"
