"""Real SGLang servers for tests: one process group each, a log file each, ended whatever happens."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

START_TIMEOUT_S = 240
ANSWER_TIMEOUT_S = 240
QUIET = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# Tiny models: threads that wait for one another cost more than they give, and a test may share two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# One a port that was handed out; see `free_port`.
_claims: list[socket.socket] = []


class ServerFailed(RuntimeError):
    """A server ended or hung; the message carries the end of its log."""


@dataclass(frozen=True)
class ServerSpec:
    """What distinguishes one server of the tests from another."""

    name: str
    model: Path
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    python: str = sys.executable


@dataclass(frozen=True)
class Answer:
    """One generation of `/generate`."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of `tokens`
    top: tuple[dict[int, float], ...]  # the best alternatives of each token, if they were asked for
    text: str
    prompt_tokens: int
    cached_tokens: int
    retractions: int
    finish: str


def launch_command(python: str, args: Sequence[str]) -> list[str]:
    """The launcher as a user types it."""
    return [python, "-m", "sglang.launch_server", *args]


def launch_env(extra: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """This process's environment without the plugin's settings, offline, plus `extra`."""
    inherited = {name: value for name, value in os.environ.items() if name != "LESSISMORE_CONFIG"}
    return {**inherited, **QUIET, **ONE_THREAD, **dict(extra)}


@dataclass(frozen=True)
class Outcome:
    """How a launcher that should come to an end by itself did so."""

    code: int | None  # None: it did not, and was ended
    out: str
    err: str


def run_launcher(args: Sequence[str], *, cwd: Path, env: Sequence[tuple[str, str]] = ()) -> Outcome:
    """Run the launcher to its end, on a port of its own."""
    process = subprocess.Popen(
        launch_command(sys.executable, [*args, "--port", str(free_port()), "--nccl-port", str(free_port())]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=launch_env(env),
        start_new_session=True,
    )
    code = None
    try:
        out, err = process.communicate(timeout=START_TIMEOUT_S)
        code = process.returncode
    except subprocess.TimeoutExpired:
        end_group(process)
        out, err = process.communicate()
    finally:
        end_group(process)
    return Outcome(code, out, err)


def free_port() -> int:
    """A port that nothing listens on, different at every call, also of test sessions that run at the same time.

    A server binds some of its ports only seconds after it chose them. So they lie below the range from which systems
    number outgoing connections, and each is claimed by a name that the system frees when this process ends.
    """
    while True:
        port = random.randrange(12000, 32000)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sgl-lim-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and everything that shares its group, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Server:
    """Context manager around one launcher process; `start` may be called apart from `wait_ready`."""

    def __init__(self, spec: ServerSpec, folder: Path) -> None:
        self.spec = spec
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"{spec.name}.{self.port}.log"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the launcher in a process group of its own."""
        args = ["--model-path", str(self.spec.model), "--device", "cpu", "--host", "127.0.0.1"]
        args += ["--port", str(self.port), "--nccl-port", str(free_port()), "--sleep-on-idle", *self.spec.args]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                launch_command(self.spec.python, args),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                env=launch_env(self.spec.env),
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until `/health` has generated a token. Raises `ServerFailed`."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if requests.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.25)
        raise ServerFailed(f"{self.spec.name} was not ready after {START_TIMEOUT_S} s\n{self.log_tail()}")

    def check_alive(self) -> None:
        """Raise `ServerFailed` if the launcher ended."""
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            raise ServerFailed(f"{self.spec.name} ended with {code}\n{self.log_tail()}")

    @property
    def alive(self) -> bool:
        """Whether the launcher runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the process group."""
        if self._process is not None:
            end_group(self._process)

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 60) -> str:
        """The log's end, for failure messages."""
        return "\n".join(self.log().splitlines()[-lines:])

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """POST JSON (or, with `data=`, raw bytes)."""
        return self._request("POST", path, json=body, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET."""
        return self._request("GET", path, **options)

    def _request(self, how: str, path: str, **options: Any) -> requests.Response:
        try:
            return requests.request(how, f"{self.url}{path}", **{"timeout": ANSWER_TIMEOUT_S, **options})
        except requests.RequestException as error:
            raise ServerFailed(f"{self.spec.name}: {how} {path}: {error}\n{self.log_tail()}") from error

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 24, **options: Any) -> list[Answer]:
        """Greedy answers to prompts of token ids that arrive together, `max_new_tokens` tokens each."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling}
        reply = self.post("/generate", {**body, "return_logprob": True, "top_logprobs_num": 5, **options})
        if reply.status_code != 200:
            raise ServerFailed(f"/generate answered {reply.status_code}: {reply.text}\n{self.log_tail()}")
        return [answer_from(item) for item in reply.json()]

    def generate_one(self, prompt: Sequence[int], max_new_tokens: int = 24, **options: Any) -> Answer:
        """One prompt alone."""
        return self.generate([prompt], max_new_tokens, **options)[0]

    def generate_apart(self, jobs: Sequence[tuple[Sequence[int], int]], **options: Any) -> list[Answer]:
        """Prompts with lengths of their own, as that many clients at once."""
        with ThreadPoolExecutor(max(1, len(jobs))) as clients:
            return list(clients.map(lambda job: self.generate_one(*job, **options), jobs))

    def flush_cache(self) -> None:
        """Empty the radix cache; waits until no request runs."""
        reply = self.post("/flush_cache?timeout=60")
        assert reply.status_code == 200, f"{reply.text}\n{self.log_tail()}"

    def lessismore(self) -> dict[str, Any]:
        """The plugin's block of `/server_info`."""
        return self.get("/server_info").json()["internal_states"][0]["lessismore"]

    def counters(self) -> dict[str, int]:
        """The plugin's counters."""
        return self.lessismore()["counters"]


def answer_from(item: dict[str, Any]) -> Answer:
    """An `Answer` from one object of `/generate`'s reply."""
    meta = item["meta_info"]
    return Answer(
        tokens=tuple(item["output_ids"]),
        logprobs=tuple(entry[0] for entry in meta.get("output_token_logprobs") or ()),
        top=tuple({e[1]: e[0] for e in entries} for entries in meta.get("output_top_logprobs") or ()),
        text=item["text"],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        retractions=meta["num_retractions"],
        finish=meta["finish_reason"]["type"],
    )


class ServerPool:
    """Servers shared between tests, at most two alive; the one unused for longest ends first."""

    CAPACITY = 2

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[Server] = []  # most recently used last

    def get(self, spec: ServerSpec, beside: ServerSpec | None = None) -> Server:
        """The server of `spec`. If it has to be started, that of `beside`, which comes next, starts with it."""
        known = {server.spec: server for server in self._servers}
        found = known.get(spec)
        if found is None:
            wanted = [spec] if beside is None or beside in known else [spec, beside]
            found = self._start(wanted)
        self._servers.remove(found)
        # A server that died unnoticed fails the test that finds it dead; the next one gets a new server.
        found.check_alive()
        self._servers.append(found)
        return found

    def _start(self, specs: list[ServerSpec]) -> Server:
        while len(self._servers) > self.CAPACITY - len(specs):
            self._servers.pop(0).stop()
        started = [Server(spec, self._folder) for spec in specs]
        self._servers += started
        try:
            for server in started:
                server.start()
            for server in started:
                server.wait_ready()
        except BaseException:
            for server in started:
                self.discard(server)
            raise
        return started[0]

    def discard(self, server: Server) -> None:
        """End a server that no test should meet again."""
        server.stop()
        if server in self._servers:
            self._servers.remove(server)

    def close(self) -> None:
        """End all."""
        while self._servers:
            self._servers.pop().stop()
