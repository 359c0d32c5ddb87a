"""Replicas and their router, without either: a Python of a few lines stands in for the router."""

import json
from pathlib import Path

import pytest

from sgl_lim.programs import replicas
from sgl_lim.programs.replicas import RouterLaunch, main, replica_launches, running_router
from sgl_lim.programs.server_process import ServerFailed, claim_port

ANSWERING = """
import http.server, json, sys
class Router(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/workers" else 404)
        self.end_headers()
        self.wfile.write(json.dumps(WORKERS).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Router).serve_forever()
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(replicas, "ROUTER", ("-c", code))
    monkeypatch.setattr(replicas, "installed", lambda: True)


def launch_of(folder: Path, workers: int = 2) -> RouterLaunch:
    return RouterLaunch([f"http://worker-{n}" for n in range(workers)], "random", folder / "router.log", claim_port())


def workers(*healthy: bool) -> str:
    found = [{"url": f"http://worker-{n}", "is_healthy": one} for n, one in enumerate(healthy)]
    return f"import json\nWORKERS = json.loads({json.dumps({'workers': found})!r})\n"


def test_each_replica_has_gpus_of_its_own(tmp_path: Path) -> None:
    alike = replica_launches(["--tp-size", "2"], 2, tmp_path)
    assert [launch.arguments for launch in alike] == [("--tp-size", "2")] * 2
    apart = replica_launches(["--tp-size", "2"], 3, tmp_path, gpus_each=2)
    assert [launch.arguments[2:] for launch in apart] == [("--base-gpu-id", str(first)) for first in (0, 2, 4)]
    assert len({launch.log for launch in apart}) == 3


def test_a_router_is_ready_when_it_has_all_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, workers(True, True) + ANSWERING)
    launch = launch_of(tmp_path)
    with running_router(launch, timeout=30) as url:
        assert url == launch.url and replicas.healthy_workers(url) == 2
    assert replicas.healthy_workers(url) == 0, "it ended with its context"
    command = " ".join(launch.arguments)
    assert "--worker-urls http://worker-0 http://worker-1 --policy random --host 127.0.0.1" in command


def test_a_router_that_lacks_a_server_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, workers(True, False) + ANSWERING)
    with (
        pytest.raises(ServerFailed, match=r"the router is not ready.*router\.log"),
        running_router(launch_of(tmp_path), timeout=2),
    ):
        pass


def test_a_router_that_ends_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, "print('no such policy'); raise SystemExit(3)")
    with (
        pytest.raises(ServerFailed, match=r"(?s)the router ended with 3.*no such policy"),
        running_router(launch_of(tmp_path), timeout=30),
    ):
        pass


def test_a_missing_router_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replicas, "installed", lambda: False)
    with pytest.raises(ServerFailed, match=r"pip install .*sglang-router"), running_router(launch_of(tmp_path)):
        pass


def test_the_command_needs_server_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--replicas", "0", "--", "--model-path", "m"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
    assert "at least 1" in capsys.readouterr().err
