"""Real SGLang servers for tests, on the supervisor that the demo and the benchmarks use."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from sgl_lim.programs.server_process import LAUNCHER, Launch, ServerFailed, ServerProcess, claim_port, end_tree

START_TIMEOUT_S = 240
ANSWER_TIMEOUT_S = 240
QUIET = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
# Tiny models: threads that wait for one another cost more than they give, and a test may share two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CHILDREN = "LIM_TEST_CHILDREN"
QUICK = ((CHILDREN, "10"),)
"""A launcher imports once for all of its processes; see `quick_start`, which has to be on the path."""
AS_USERS = ((CHILDREN, "0"),)
"""Each process imports for itself, as on a user's machine."""

_log_numbers = itertools.count()  # a server may be started again


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
        [sys.executable, *LAUNCHER, *args, "--port", str(claim_port()), "--nccl-port", str(claim_port())],
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
        end_tree(process)
        out, err = process.communicate()
    finally:
        end_tree(process)
    return Outcome(code, out, err)


class Server:
    """Context manager around one server and its HTTP; `start` may be called apart from `wait_ready`."""

    def __init__(self, spec: ServerSpec, folder: Path) -> None:
        self.spec = spec
        self._process = ServerProcess(
            Launch(
                ("--model-path", str(spec.model), "--device", "cpu", "--sleep-on-idle", *spec.args),
                log=folder / f"{spec.name}.{next(_log_numbers)}.log",
                name=spec.name,
                python=spec.python,
                environment=launch_env((*QUICK, *spec.env)),
                folder=folder,
            )
        )
        self.url = self._process.url

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
        self._process.start()

    def wait_ready(self) -> None:
        """Wait until the server has generated a token. Raises `ServerFailed`."""
        self._process.wait_ready(START_TIMEOUT_S)

    def check_alive(self) -> None:
        """Raise `ServerFailed` if the launcher ended."""
        self._process.check_alive()

    @property
    def alive(self) -> bool:
        """Whether the launcher runs."""
        return self._process.alive

    def stop(self) -> None:
        """Kill the server and all its processes."""
        self._process.stop()

    def log(self) -> str:
        """Everything the server printed so far."""
        return self._process.log()

    def log_tail(self) -> str:
        """The log's end, for failure messages."""
        return self._process.log_tail()

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

    def counted_since(self, before: dict[str, int]) -> dict[str, int]:
        """By how much the plugin's counters have grown."""
        return {name: total - before[name] for name, total in self.counters().items()}


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
