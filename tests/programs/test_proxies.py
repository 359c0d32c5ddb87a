"""With proxies in the environment: loopback is asked directly by every client, and errors name a proxy."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import proxy_bypass

import pytest
from stub_endpoint import StubEndpoint

from sgl_lim.programs import proxies
from sgl_lim.programs.cli import main
from sgl_lim.programs.endpoint import EndpointError, server_info

PASSWORD = "of-the-proxy"


class Proxy(ThreadingHTTPServer):
    """Refuses everything, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(502, "Bad Gateway")

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(autouse=True)
def no_opener(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib keeps the proxies of its first request for all later ones of a process."""
    monkeypatch.setattr("urllib.request._opener", None)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            # Set first, so that what the code under test sets is taken back as well.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("http_proxy", f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.3"])
def test_a_run_asks_loopback_directly(
    proxy: Proxy, stub: StubEndpoint, host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frontend asks by urllib, everything else by requests."""
    url = stub.url.replace("127.0.0.1", host)
    argv = ["--endpoint", url, "--chains", "2", "--facts", "8", "--steps", "2", "--output", str(tmp_path / "o")]
    if host == "127.0.0.3":  # the stub listens on another address; what matters is who is asked
        assert main(argv) == 1 and "Connection refused" in capsys.readouterr().err
    else:
        assert main(argv) == 0 and len(stub.prompts) == 2
    assert not proxy.asked


def test_an_error_names_the_proxy_without_its_password(proxy: Proxy) -> None:
    with pytest.raises(EndpointError) as raised:
        server_info("http://server.invalid:30000")
    said = str(raised.value)
    assert "HTTP 502" in said and f"through the proxy http://127.0.0.1:{proxy.server_port} " in said
    assert proxy.asked == ["http://server.invalid:30000/server_info"] and PASSWORD not in said


def test_a_proxy_that_is_away_is_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(EndpointError, match=r"through the proxy http://127\.0\.0\.1:9 .*Connection refused"):
        server_info("http://server.invalid:30000")


def test_other_hosts_keep_their_proxies_and_exceptions(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("NO_PROXY", "internal.example, 10.0.0.0/8")
    proxies.keep_direct("http://server.invalid:30000")
    assert "no_proxy" not in os.environ
    proxies.keep_direct("http://[::1]:30000")
    proxies.keep_direct("http://[::1]:30000")
    assert os.environ["no_proxy"] == "internal.example,10.0.0.0/8,localhost,127.0.0.1,::1,[::1]"
    direct = ["[::1]:30000", "127.0.0.1:8", "localhost", "internal.example"]
    assert all(proxy_bypass(host) for host in direct) and not proxy_bypass("server.invalid")
    assert proxies.proxy_of("http://server.invalid:1") and not proxies.proxy_of("http://internal.example")
    os.environ.pop("no_proxy")
    monkeypatch.setenv("no_proxy", "")


def test_an_environment_without_proxies_stays_as_it_is() -> None:
    assert proxies.direct_loopback({"PATH": "/bin", "no_proxy": "a"}, "http://127.0.0.1:1") == {}
    assert proxies.direct_loopback({"https_proxy": "http://p", "no_proxy": "*"}) == {}


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://0.0.0.0:1", True), ("http://[::1]", True), ("http://a.localhost", True), ("http://10.0.0.1", False)],
)
def test_what_is_loopback(url: str, expected: bool) -> None:
    assert proxies.is_loopback(url) is expected
