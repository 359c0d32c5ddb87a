"""A SGLang endpoint as far as `benchmarks/throughput.py` sees it; generations are streamed at a chosen pace."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from forced_model import ForcedModel

from programs.stub_endpoint import StubEndpoint, _Handler


@dataclass
class StreamingEndpoint(StubEndpoint):
    """Request n (from 0) answers `length(n, max_new_tokens)` tokens, `per_chunk` of them every `pause` seconds."""

    pause: float = 0.002
    per_chunk: int = 1
    length: Callable[[int, int], int] = lambda number, wanted: wanted
    model: ForcedModel = field(default_factory=ForcedModel)  # of the answers that are not streamed
    status: int = 200
    error: str | None = None  # an event that ends each stream
    info: dict[str, Any] = field(default_factory=dict)
    flushes: int = 0
    most_running: int = 0
    closed_by_client: int = 0
    _running: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> "StreamingEndpoint":
        stub = self

        class Handler(_StreamingHandler):
            endpoint = stub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def server_info(self) -> dict[str, Any]:
        info = {**super().server_info(), "max_total_num_tokens": 1000, "page_size": 1, **self.info}
        info["internal_states"][0]["effective_max_running_requests_per_dp"] = 8
        return info

    @property
    def streamed(self) -> list[dict[str, Any]]:
        """The streamed requests so far."""
        return [request for request in self.generate_requests if request.get("stream")]

    def answers(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to a batch of prompts."""
        self.generate_requests.append(request)
        return self.model.answers(request)

    def enter(self, request: dict[str, Any]) -> int:
        """Count a streamed request in, and number it."""
        with self._lock:
            self.generate_requests.append(request)
            self._running += 1
            self.most_running = max(self.most_running, self._running)
            return len(self.streamed) - 1

    def leave(self, *, closed: bool) -> None:
        """Count it out."""
        with self._lock:
            self._running -= 1
            self.closed_by_client += closed

    def decoded(self, tokens: int) -> None:
        """Let the plugin's counters count decode steps that attend a quarter."""
        with self._lock:
            if self.counters is not None:
                self.counters["decode_steps"] += tokens
                self.counters["tokens_attended"] += 25 * tokens
                self.counters["tokens_dense"] += 100 * tokens


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default of 5, clients that connect at once are kept waiting for a second


class _StreamingHandler(_Handler):
    endpoint: StreamingEndpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses():
            return
        if self.path.startswith("/flush_cache"):
            self.endpoint.flushes += 1
            self._send(200, {})
            return
        request = json.loads(body)
        if not request.get("stream"):
            self._send(200, self.endpoint.answers(request))  # type: ignore[arg-type]
        elif self.endpoint.status != 200:
            self._send(self.endpoint.status, {"error": {"message": "refused"}})
        else:
            self._stream(request)

    def _stream(self, request: dict[str, Any]) -> None:
        stub, closed = self.endpoint, False
        number = stub.enter(request)
        length = stub.length(number, request["sampling_params"]["max_new_tokens"])
        try:
            self.send_response(200)
            self.end_headers()
            for sent in range(0, length, stub.per_chunk):
                time.sleep(stub.pause)
                tokens = min(sent + stub.per_chunk, length)
                stub.decoded(tokens - sent)
                self._event({"output_ids": [5] * (tokens - sent), "meta_info": {"completion_tokens": tokens, "id": 1}})
            if stub.error:
                self._event({"error": {"message": stub.error}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            closed = True
        stub.leave(closed=closed)

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
