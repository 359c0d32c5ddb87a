"""The servers that the served tests share, and the prompts they send."""

import fcntl
import json
import os
import pickle
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgl_lim.methods import METHODS
from sgl_lim.settings.config import ENV
from support.agreement import errors
from support.driven_layers import scopes_of, sizes_of
from support.float64_qwen3 import Float64Qwen3
from support.gates import with_gates
from support.probe_records import Probe
from support.server import AS_USERS, Answer, ServerPool, ServerSpec
from support.set_oracle import SetRule
from support.tiny_model import write_tiny_model

LAYERS = 6
SELECTION_LAYERS = (1, 3)
ROLES = ("dense", "select", "sparse", "select", "sparse", "sparse")
HEAD_DIM = 32
HEADS = {"gqa": (8, 2), "mqa": (5, 1), "mha": (4, 4), "many": (16, 8)}
NEW_TOKENS = 24
CHUNK = 512
"""Tokens of a prompt that a lessismore server prefills at once."""
COMMON_ARGS = ("--max-total-tokens", "8192", "--max-running-requests", "32")
NEXT_PYTHON = "SGL_LIM_NEXT_PYTHON"


@dataclass(frozen=True)
class LimCase:
    """One lessismore server: model shape, page size, dtype and the method with its parameters."""

    kind: str
    page_size: int
    rule: SetRule
    dtype: str = "float32"
    release: str = "current"  # or "next": the other supported SGLang, in an environment of its own
    prefix_selection: str = "request"
    hybrid: bool = False
    """Turned on by `--decode-attention-backend` beside SGLang's own prefill, with settings from the environment."""

    @property
    def name(self) -> str:
        """Id of the server in test names and log files."""
        more = "-group" if self.prefix_selection == "group" else ""
        more += "-heads" if self.rule.scope == "kv_head" else ""
        more += "-set" if self.rule.attends == "set" else ""
        more += "-hybrid" if self.hybrid else ""
        return f"{self.kind}-page{self.page_size}-{self.dtype}-{self.method}{more}-{self.release}"

    def __str__(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        """What the set is chosen by: the aggregate of lessismore, the method of others."""
        return self.rule.aggregate if self.rule.method == "lessismore" else self.rule.method

    def settings(self) -> dict[str, Any]:
        """The plugin's settings, by their keys in the environment variable."""
        rule = self.rule
        return {
            "method": rule.method,
            "budget": rule.budget,
            "selection_layers": list(SELECTION_LAYERS),
            "recency": rule.recency,
            "sinks": rule.sinks,
            "aggregate": rule.aggregate,
            "prefix_selection": self.prefix_selection,
            "scope": rule.scope,
            "selection_attends": rule.attends,
            **with_gates(rule.method, LAYERS, *HEADS[self.kind], HEAD_DIM),
        }

    def turned_on(self) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Arguments and environment that turn the plugin on with these settings, in the form of this case."""
        if self.hybrid:
            args = ("--attention-backend", "torch_native", "--decode-attention-backend", "lessismore")
            return args, ((ENV, json.dumps(self.settings())), *AS_USERS)
        flags = {f"--lim-{name.replace('_', '-')}": value for name, value in self.settings().items()}
        flags["--lim-selection-layers"] = ",".join(map(str, SELECTION_LAYERS))
        return ("--attention-backend", "lessismore", *(str(x) for pair in flags.items() for x in pair)), ()


MAIN = LimCase("gqa", 1, SetRule("lessismore", 256, 0.25, 4, "union"))
GROUP = replace(MAIN, prefix_selection="group")
_GIVEN_CASES = (
    MAIN,
    LimCase("gqa", 16, SetRule("lessismore", 256, 0.3, 5, "max")),
    LimCase("mqa", 16, SetRule("lessismore", 193, 0.5, 0, "sum", attends="set")),
    LimCase("mha", 1, SetRule("window", 256, 0.25, 4, "union")),
    LimCase("mha", 16, SetRule("lessismore", 256, 0.0, 4, "union")),
    LimCase("gqa", 1, SetRule("lessismore", 256, 0.25, 4, "union", "kv_head"), hybrid=True),
    LimCase("gqa", 16, SetRule("tidaldecode", 256, 0.0, 0, "max", "kv_head")),
    LimCase("gqa", 16, SetRule("quest", 256, 0.0, 0, "max", "kv_head")),
    LimCase("gqa", 16, SetRule("seerattention", 256, 0.0, 0, "max", "kv_head")),
)


def default_case(method: str) -> LimCase:
    """A case of a method that no case was written for."""
    kind = METHODS[method]
    return LimCase("gqa", kind().page, SetRule(method, 256, *sizes_of(kind), "max", scopes_of(kind)[0]))


_GIVEN_METHODS = {case.rule.method for case in _GIVEN_CASES}
FLOAT32_CASES = (*_GIVEN_CASES, *(default_case(name) for name in METHODS if name not in _GIVEN_METHODS))
"""Every registered method is among them."""
METHOD_CASES = tuple(
    # Of each method one case: larger pages have more ways to go wrong.
    max((case for case in FLOAT32_CASES if case.rule.method == name), key=lambda case: case.page_size)
    for name in METHODS
)
NEXT_CASES = tuple(
    replace(case, release="next")
    for case in (*FLOAT32_CASES[:2], *(case for case in FLOAT32_CASES if case.rule.method == "seerattention"))
)
HYBRID = next(case for case in FLOAT32_CASES if case.hybrid)
LOW_PRECISION = replace(MAIN, dtype="bfloat16")


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids without the specials, different for every seed from the first token on."""
    rng = random.Random(f"{seed}/{length}")
    return [rng.randrange(12, 512) for _ in range(length)]


def prompts_within(budget: int) -> list[list[int]]:
    """Prompts whose context never exceeds the budget, one of them ending exactly at it."""
    lengths = (1, 2, 17, 60, 130, budget - NEW_TOKENS - 7, budget - NEW_TOKENS)
    return [random_prompt(length, seed) for seed, length in enumerate(lengths)]


def prompts_beyond(budget: int) -> list[list[int]]:
    """Prompts of mixed lengths: within the budget, crossing it while decoding, and far beyond it.

    Decoding `NEW_TOKENS` tokens, no two of them pass through the same length.
    """
    lengths = (33, budget - NEW_TOKENS // 2, budget + 2 * NEW_TOKENS, 410, 777)
    return [random_prompt(length, 100 + seed) for seed, length in enumerate(lengths)]


class Fleet:
    """Makes the shared servers' specs and remembers what the dense ones answered."""

    def __init__(self, folder: Path, pool: ServerPool, *, shared: Path) -> None:
        """`shared` is a folder of all processes of a test session, `folder` of this one alone."""
        self._folder, self._pool, self._shared = folder, pool, shared
        self._models: dict[str, Path] = {}
        self._probe: Probe | None = None
        self._dense: dict[ServerSpec, DenseRun] = {}

    def model(self, kind: str) -> Path:
        """A tiny checkpoint with this head layout."""
        if kind not in self._models:
            heads, kv_heads = HEADS[kind]
            path = self._folder / f"model-{kind}"
            self._models[kind] = write_tiny_model(
                path, layers=LAYERS, heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIM
            )
        return self._models[kind]

    @property
    def probe(self) -> Probe:
        """The recorder that every lessismore server of the fleet loads."""
        if self._probe is None:
            self._probe = Probe(self._folder / "probe")
        return self._probe

    def dense_spec(self, case: LimCase) -> ServerSpec:
        """SGLang's own dense backend on the same release, model and dtype."""
        args = ("--attention-backend", "torch_native", "--dtype", case.dtype, *COMMON_ARGS)
        name = f"dense-{case.kind}-{case.dtype}-{case.release}"
        return ServerSpec(name, self.model(case.kind), args, python=interpreter(case.release))

    def lim_spec(self, case: LimCase) -> ServerSpec:
        """A lessismore server with metrics and the probe."""
        on, env = case.turned_on()
        args = (*on, "--dtype", case.dtype)
        args += ("--page-size", str(case.page_size), "--enable-metrics", "--chunked-prefill-size", str(CHUNK))
        args += COMMON_ARGS
        env += self.probe.env
        return ServerSpec(case.name, self.model(case.kind), args, env=env, python=interpreter(case.release))

    def dense_run(self, case: LimCase) -> "DenseRun":
        """The dense backend's answers to the case's prompts; cases that differ in page size or method share them.

        The first process that wants them asks a server, the others wait for what it finds.
        """
        spec = self.dense_spec(case)
        if spec not in self._dense:
            path = self._shared / f"{spec.name}.pickle"
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    path.write_bytes(pickle.dumps(self._ask_dense(case)))
            self._dense[spec] = pickle.loads(path.read_bytes())
        return self._dense[spec]

    def _ask_dense(self, case: LimCase) -> "DenseRun":
        server = self._pool.get(self.dense_spec(case))
        within, beyond = prompts_within(case.rule.budget), prompts_beyond(case.rule.budget)
        model = Float64Qwen3(self.model(case.kind), getattr(torch, case.dtype))
        answers = server.generate(within, NEW_TOKENS)
        noise = errors(model, within, answers)
        return DenseRun(answers, noise, errors(model, beyond, server.generate(beyond, NEW_TOKENS)))


@dataclass(frozen=True)
class DenseRun:
    """What the dense backend answers and how far it is from float64."""

    within: list[Answer]  # to `prompts_within`
    noise_within: tuple[float, float]  # largest error and largest magnitude of a log-probability
    noise_beyond: tuple[float, float]  # the same for `prompts_beyond`


def interpreter(release: str) -> str:
    """The Python that has this SGLang release."""
    return sys.executable if release == "current" else os.environ[NEXT_PYTHON]
