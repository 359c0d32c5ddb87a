"""The server supervisor with small programs in place of SGLang's launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sgl_lim.programs import server_process
from sgl_lim.programs.server_process import Launch, ServerFailed, ServerProcess, claim_port, running_server

READY = """
import http.server, os, signal, subprocess, sys
SLEEP = "import time; time.sleep(600)"
NESTED = f"import subprocess as s, sys; print(s.Popen([sys.executable, '-c', {SLEEP!r}], stdout=s.DEVNULL).pid)"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health_generate" else 404)
        self.end_headers()
    def log_message(self, *args): pass
child = subprocess.Popen([sys.executable, "-c", SLEEP])
session = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
orphan = subprocess.run([sys.executable, "-c", NESTED], stdout=subprocess.PIPE, text=True).stdout.strip()
print(os.getpid(), child.pid, session.pid, orphan, flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", flush=True), os._exit(0)))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SILENT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
# In naps: a signal that arrives just before a long sleep begins would be noticed when the sleep ends.
USER = """
import faulthandler, sys, time
from pathlib import Path
from sgl_lim.programs import server_process
from sgl_lim.programs.server_process import Launch, running_server
server_process.LAUNCHER = ("-c", sys.argv[2])
with running_server(Launch((), Path(sys.argv[1])), timeout=60):
    print("ready", flush=True)
    faulthandler.dump_traceback_later(100)
    while True:
        time.sleep(0.1)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(("--flag", "a value"), tmp_path / "logs" / "server.log", name="one")


def launch_with(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(server_process, "LAUNCHER", ("-c", script))


def running(log: Path) -> list[int]:
    """Which of the processes in the log's first line run."""
    pids = [int(word) for word in log.read_text().splitlines()[0].split()]
    assert pids
    return [p.pid for p in psutil.process_iter() if p.pid in pids and server_process.is_running(p)]


def test_a_server_is_ready_and_ends_with_all_its_processes(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, READY)
    with running_server(launch, timeout=60) as server:
        assert server.alive and server.url.startswith("http://127.0.0.1:")
        assert len(running(launch.log)) == 4
    assert not server.alive and not running(launch.log)
    assert "asked to end" in server.log()
    with pytest.raises(ServerFailed, match="one does not run"):
        server.check_alive()


def test_without_grace_a_server_is_not_asked(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, READY)
    server = ServerProcess(launch)
    server.start()
    server.wait_ready(60)
    server.stop()
    server.stop()
    assert not running(launch.log) and "asked to end" not in server.log()


def test_processes_of_a_launcher_that_died_are_ended(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, READY.replace("start_new_session=True", "start_new_session=False"))
    with running_server(launch, timeout=60) as server:
        os.kill(int(server.log().split()[0]), signal.SIGKILL)
        while server.alive:
            time.sleep(0.01)
        with pytest.raises(ServerFailed, match="one ended with -9"):
            server.check_alive()
        assert running(launch.log)
    assert not running(launch.log)


def test_an_error_of_the_caller_ends_the_server(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, READY)
    with pytest.raises(ZeroDivisionError), running_server(launch, timeout=60):
        raise ZeroDivisionError
    assert not running(launch.log)


def test_a_server_that_ends_while_starting_shows_its_log(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, "import sys; print('unknown flags', sys.argv[1:3]); sys.exit(3)")
    with pytest.raises(ServerFailed) as error, running_server(launch, timeout=60):
        pass
    assert "one ended with 3" in str(error.value) and str(launch.log) in str(error.value)
    assert "unknown flags ['--flag', 'a value']" in str(error.value)


def test_a_server_that_never_answers_is_given_up_and_ended(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, SILENT)
    with pytest.raises(ServerFailed, match="one was not ready after 1 s"), running_server(launch, timeout=1):
        pass
    assert not running(launch.log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_program_ends_its_servers(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    user = subprocess.Popen([sys.executable, "-c", USER, str(log), READY], stdout=subprocess.PIPE, text=True)
    try:
        assert user.stdout is not None and user.stdout.readline() == "ready\n"
        assert len(running(log)) == 4
        user.send_signal(number)
        assert user.wait(120) in (128 + number, -number)
        assert not running(log)
    finally:
        user.kill()
        user.wait()


def test_the_launch_decides_environment_folder_and_python(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_with(monkeypatch, "import os, sys; print(sys.executable, os.getcwd(), sorted(os.environ)); sys.exit(1)")
    folder = launch.log.parent.parent
    environment = {"ONLY": "this"}
    own = Launch((), launch.log, environment=environment, folder=folder)
    with pytest.raises(ServerFailed, match="ended with 1") as error, running_server(own, timeout=60):
        pass
    assert f"{sys.executable} {folder} " in str(error.value)
    assert "'ONLY'" in str(error.value) and "'PATH'" not in str(error.value)


def test_ports_are_claimed_once_also_by_other_processes() -> None:
    here = {claim_port() for _ in range(20)}
    assert len(here) == 20 and max(here) < 32768
    script = """
import random, sys
from sgl_lim.programs.server_process import claim_port
taken = set(map(int, sys.argv[1:]))
random.sample = lambda ports, count: [*taken, 31999, 31998, 31997]
print(claim_port())
"""
    other = subprocess.run(
        [sys.executable, "-c", script, *map(str, here)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(other.stdout) not in here
