"""A SGLang endpoint as far as the programs see it, in a thread of the test process."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, str]  # a generation's text, or an HTTP status and message
COUNTERS = ("decode_steps", "tokens_attended", "tokens_dense", "selections", "requests", "requests_dense")


@dataclass
class StubEndpoint:
    """`answer` maps a prompt to its reply and runs in the request's thread; everything may change while it runs."""

    answer: Callable[[str], Reply] = lambda prompt: "answer 0"
    logprob: Callable[[str], float] = lambda text: -1.0  # of each token of a reply
    finish_reason: dict[str, Any] = field(default_factory=lambda: {"type": "stop"})
    counters: dict[str, int] | None = None  # None: dense
    startup_time: float = 1.0
    context: int = 4096
    model_path: str = "stub-model"
    can_tokenize: bool = True
    tokens_per_word: int = 1
    tokens: list[str] = field(default_factory=list)  # texts that are one token; others have one unknown token a word
    api_key: str | None = None  # of a protected server
    generate_requests: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "StubEndpoint":
        stub = self

        class Handler(_Handler):
            endpoint = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def prompts(self) -> list[str]:
        """Of the generations, without the empty ones that only cache a prefix."""
        return [r["text"] for r in self.generate_requests if r["sampling_params"]["max_new_tokens"]]

    def go_away(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def server_info(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.counters is not None:
            state["lessismore"] = {
                "method": "lessismore",
                "budget": 256,
                "recency": 0.25,
                "sinks": 4,
                "selection_layers": [4, 8],
                "selection_layers_from": "the calibration kept in x.json",
                "selection_layers_measured": {"agreement": 0.95},
                "layer_roles": ["dense"],
                "aggregate": "union",
                "dense_backend": "torch_native",
                "counters": dict(self.counters),
            }
        return {
            "model_path": self.model_path,
            "version": "0.0.stub",
            "attention_backend": "torch_native",
            "decode_attention_backend": None,
            "kv_cache_dtype": "auto",
            "quantization": None,
            "startup_time": {"tokenizer_e2e": self.startup_time},
            "max_req_input_len": self.context,
            "internal_states": [state],
        }

    def generate(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.generate_requests.append(request)
        prompt_tokens = len(request["text"].split())
        text = ""
        if request["sampling_params"]["max_new_tokens"]:
            reply = self.answer(request["text"])
            if isinstance(reply, tuple):
                return reply[0], {"error": {"message": reply[1]}}
            text = reply
        if self.counters is not None:
            self.counters["decode_steps"] += len(text.split())
            self.counters["tokens_attended"] += 25 * len(text.split())
            self.counters["tokens_dense"] += 100 * len(text.split())
        meta = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(text.split()),
            "cached_tokens": prompt_tokens // 2,
            "finish_reason": self.finish_reason,
        }
        if request.get("return_logprob"):
            meta["output_token_logprobs"] = [[self.logprob(text), 7, None] for _ in text.split()]
        return 200, {"text": text, "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    endpoint: StubEndpoint

    def refuses(self) -> bool:
        """Whether the request has no right key, and was told so, as SGLang does."""
        key = self.endpoint.api_key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._send(401, {"error": "Unauthorized"})
        return True

    def do_GET(self) -> None:
        if self.refuses():
            return
        if self.path == "/server_info":
            self._send(200, self.endpoint.server_info())
        elif self.path in ("/model_info", "/get_model_info"):
            self._send(200, {"model_path": self.endpoint.model_path})
        else:
            self._send(404, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuses():
            return
        if self.path == "/generate":
            self._send(*self.endpoint.generate(request))
        elif self.path == "/tokenize" and self.endpoint.can_tokenize:
            prompt, tokens = request["prompt"], self.endpoint.tokens
            if isinstance(prompt, str):
                ids = [tokens.index(prompt)] if prompt in tokens else [999] * len(prompt.split())
                self._send(200, {"tokens": ids, "count": len(ids)})
            else:
                self._send(200, {"count": [self.endpoint.tokens_per_word * len(text.split()) for text in prompt]})
        elif self.path == "/detokenize":
            known = dict(enumerate(self.endpoint.tokens))
            self._send(200, {"text": "".join(known.get(token, "<unk>") for token in request["tokens"])})
        else:
            self._send(500, {})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client was killed meanwhile

    def log_message(self, format: str, *args: object) -> None:
        pass
