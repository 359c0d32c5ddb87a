"""Latency of one decode step of SGLang backends by batch and context, prefill skipped, first backend the baseline.

Each backend runs in a process of its own: one model load, all cases. A case `BxC` is B requests of C tokens each that
share nothing. Their KV slots are allocated as a prefill would, the pool holds normal noise, and no prefill is computed.
A step is one forward pass with greedy sampling, timed on the host between two device synchronisations. The query of
step i (from 0, `--warmup` steps first) attends to C + i + 1 tokens, so the timed ones see C + warmup + 1 to
C + warmup + steps. Dummy weights are SGLang's, seeded, except that norms multiply by 1: as loaded, they scale
queries to nearly nothing, all tokens score alike, and neither a selection nor an error in it would show.

Before anything is timed, every backend decodes two steps of two requests, within every budget, with the same weights,
tokens, keys and values; its logits must be the first backend's up to rounding. Beyond the budget they must be finite.
A backend that fails has no speed. Which tokens a selection picks beyond the budget is not checked here.

    python benchmarks/decode_step.py --model-path M --backends fa3 lessismore:budget=2048,aggregate=max \
        --cases 1x2048 16x32768 64x8192 --output out/decode_step.csv --sglang-args='--mem-fraction-static 0.85'

One device only. Written for SGLang 0.5.17's internals (`sglang.benchmark.one_batch`).
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_line
from results_file import append_rows
from torch import Tensor

from sgl_lim.config import ENV, LimConfig

Case = tuple[int, int]
LARGEST_LOGITS_ERROR = 0.05
CHECKED_REQUESTS = 2
CHECKED_STEPS = 2
COLUMNS = (
    *("backend", "batch", "context", "step_ms", "p20_ms", "p80_ms", "ratio", "tokens_per_s"),
    *("logits_error_within_budget", "slots", "steps", "error", "command", "machine"),
)


@dataclass(frozen=True)
class Backend:
    """A backend as the command line names it."""

    spec: str
    name: str
    lim: LimConfig | None
    environment: dict[str, str]

    def command(self, argv: list[str]) -> str:
        """The worker's environment and SGLang arguments, as a shell would take them."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(argv)])


@dataclass
class Outcome:
    """What a worker found, saved before the first and after every case: a crash loses only what comes after it."""

    times: dict[Case, list[float]] = field(default_factory=dict)
    """Milliseconds of each timed step."""
    errors: dict[Case, str] = field(default_factory=dict)
    error: str = ""
    """Why the worker stopped early."""
    logits: Tensor | None = None
    """Within the budget: (step, request, vocabulary), float32, on the CPU."""
    finite: bool = True
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    """Of one profiled step: name, launches, microseconds in all."""
    machine: str = ""

    def save(self, path: Path) -> None:
        """Replace the file in one move."""
        torch.save(vars(self), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def parse_backend(spec: str) -> Backend:
    """`fa3`, or `lessismore:budget=2048,selection_layers=2-12` with the keys of `LimConfig`."""
    name, _, settings = spec.partition(":")
    if name != "lessismore":
        if settings:
            raise argparse.ArgumentTypeError(f"only lessismore takes settings, got {spec!r}")
        return Backend(spec, name, None, {})
    known = [f.name for f in dataclasses.fields(LimConfig)]
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in known:
            raise argparse.ArgumentTypeError(f"{spec!r}: unknown setting {key!r}; known are {', '.join(known)}")
        values[key] = [int(i) for i in value.split("-")] if key == "selection_layers" else _scalar(value)
    layers = values.get("selection_layers")
    lim = LimConfig(**{**values, "selection_layers": layers and tuple(layers)})
    if problems := lim.problems():
        raise argparse.ArgumentTypeError(f"{spec!r}: {'; '.join(problems)}")
    return Backend(spec, name, lim, {ENV: json.dumps(values)})


def _scalar(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_case(text: str) -> Case:
    """`16x32768` as (16, 32768): requests, tokens of context each."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected REQUESTSxTOKENS such as 16x32768, got {text!r}")
    batch, context = text.split("x")
    return int(batch), int(context)


class NoRoom(Exception):
    """A case exceeds what the message names: the KV or request `pool`, or the model's `context`."""


class Bench:
    """A model runner set up as SGLang's own static benchmark does it, its KV pool filled with noise."""

    def __init__(self, argv: list[str], shuffle_slots: bool) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()  # the mains that serve do this; a benchmark must do it itself, before flags are parsed
        import sglang.benchmark.one_batch as one_batch
        from sglang.srt.server_args import PortArgs, prepare_server_args

        server_args = prepare_server_args(argv)
        if server_args.tp_size != 1:
            raise ValueError(f"this benchmark drives one device, got --tp-size {server_args.tp_size}")
        one_batch._set_envs_and_config(server_args)
        one_batch.initialize_moe_config(server_args)
        one_batch.initialize_fp8_gemm_config(server_args)
        one_batch.initialize_fp4_gemm_config(server_args)
        one_batch.get_tokenizer = lambda *args, **options: None  # `load_model` wants one; we send token ids
        wrapped, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), gpu_id=0, tp_rank=0)
        self.one_batch = one_batch
        self.runner: Any = wrapped.torch_runner
        self.shuffle_slots = shuffle_slots
        self.synchronize = torch.get_device_module(self.runner.device).synchronize
        if server_args.load_format == "dummy":
            set_norms_to_one(self.runner.model)
        for buffer in self.kv_buffers():
            fill_with_noise(buffer)

    def kv_buffers(self) -> list[Tensor]:
        """Keys and values of every layer, each (slot, head, dim)."""
        pool = self.runner.token_to_kv_pool
        layers = range(self.runner.model_config.num_hidden_layers)
        return [buffer(layer) for layer in layers for buffer in (pool.get_key_buffer, pool.get_value_buffer)]

    @torch.no_grad()
    def start(self, case: Case, steps: int) -> tuple[Tensor, Any]:
        """First decode tokens and a batch whose prompts own KV slots. Raises NoRoom if `steps` more do not fit."""
        runner, (requests, context) = self.runner, case
        rows, slots = runner.req_to_token_pool, runner.token_to_kv_pool_allocator
        rows.clear()
        slots.clear()
        if context + steps > runner.model_config.context_len:
            raise NoRoom("context")
        pages = -(-(context + steps) // slots.page_size)
        if requests > rows.available_size() or requests * pages * slots.page_size > slots.available_size():
            raise NoRoom("pool")
        random = np.random.default_rng(0)
        if self.shuffle_slots:
            # A generator of its own: how much it draws depends on the pool's size, and tokens must not.
            order = np.random.default_rng(1).permutation(len(slots.free_pages))
            slots.free_pages = slots.free_pages[torch.from_numpy(order).to(slots.free_pages.device)]
        vocabulary = runner.model_config.vocab_size
        first_tokens = torch.from_numpy(random.integers(0, vocabulary, requests)).to(runner.device)
        batch = self.one_batch.ScheduleBatch.init_new(
            reqs=[self.request(i, random.integers(0, vocabulary, context)) for i in range(requests)],
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=slots,
            tree_cache=self.one_batch.TreeCacheNamespace(
                page_size=slots.page_size, device=runner.device, token_to_kv_pool_allocator=slots
            ),
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=self.one_batch.SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        batch.prefill_input_ids_cpu = None
        return first_tokens, batch

    def request(self, number: int, prompt: np.ndarray) -> Any:
        """A greedy request whose whole prompt is to be prefilled."""
        request = self.one_batch.Req(
            rid=str(number),
            origin_input_text="",
            origin_input_ids=array("q", prompt.astype(np.int64).tobytes()),
            sampling_params=self.one_batch.SamplingParams(temperature=0, max_new_tokens=1),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.set_extend_range(0, len(prompt))
        return request

    def step(self, tokens: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """One decode step: the sampled tokens and the logits."""
        return self.one_batch.decode(tokens, batch, self.runner)

    def time_steps(self, case: Case, warmup: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps after `warmup`."""
        tokens, batch = self.start(case, warmup + steps)
        times = []
        for _ in range(warmup + steps):
            self.synchronize()
            begin = time.perf_counter()
            tokens, _ = self.step(tokens, batch)
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return times[warmup:]

    def logits(self, context: int, own_noise: bool) -> Tensor:
        """Logits of the checked steps, (step, request, vocabulary) in float32 on the CPU.

        `own_noise` writes keys and values by position in the prompt, so that they are the same for every backend,
        whatever the pool's size and the slots. The tokens are given, not sampled: a tie cannot part two backends.
        """
        tokens, batch = self.start((CHECKED_REQUESTS, context), CHECKED_STEPS)
        if own_noise:
            table = self.runner.req_to_token_pool.req_to_token
            slots = table[batch.req_pool_indices, :context].reshape(-1).long()
            generator = torch.Generator().manual_seed(0)
            for buffer in self.kv_buffers():
                noise = torch.randn(len(slots), *buffer.shape[1:], generator=generator).to(buffer.dtype)
                # As bytes: not every device can index float8.
                buffer.view(torch.uint8)[slots] = noise.view(torch.uint8).to(buffer.device)
        found = []
        for _ in range(CHECKED_STEPS):
            found.append(self.step(tokens, batch)[1].float().cpu())
            tokens = tokens.flip(0)
        return torch.stack(found)

    def kernels(self, case: Case, warmup: int) -> list[tuple[str, int, float]]:
        """Kernels (on a CPU: operators) of one step after `warmup`: name, launches, microseconds; longest first."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        tokens, batch = self.start(case, warmup + 1)
        for _ in range(warmup):
            tokens, _ = self.step(tokens, batch)
        self.synchronize()
        on_cpu = self.runner.device == "cpu"
        with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiler:
            self.step(tokens, batch)
            self.synchronize()
        found = [
            (event.key, event.count, event.self_cpu_time_total if on_cpu else event.self_device_time_total)
            for event in profiler.key_averages()
            if event.device_type == (DeviceType.CPU if on_cpu else DeviceType.CUDA) and not event.is_user_annotation
        ]
        return sorted(found, key=lambda row: -row[2])


def set_norms_to_one(model: torch.nn.Module) -> None:
    """Overwrite the weights of all norm layers in place."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)


def fill_with_noise(buffer: Tensor, chunk: int = 1 << 16) -> None:
    """Normal noise in place. Drawn in float32 and in chunks: float8 has no `normal_`, and pools are large."""
    for part in buffer.split(chunk):
        part.copy_(torch.randn(part.shape, device=part.device).to(part.dtype))


def work(job: dict[str, Any]) -> None:
    """A worker: check, then time or profile, saving the outcome as it grows."""
    outcome, path = Outcome(), Path(job["outcome"])
    try:
        bench = Bench(job["argv"], job["shuffle_slots"])
        outcome.machine = machine_line()
        if job["profile"]:
            outcome.kernels = bench.kernels(tuple(job["profile"]), job["warmup"])
        if job["check_context"]:
            outcome.logits = bench.logits(job["check_context"], own_noise=True)
            outcome.finite = bool(outcome.logits.isfinite().all())
        if job["sparse_context"]:
            outcome.finite &= bool(bench.logits(job["sparse_context"], own_noise=False).isfinite().all())
        outcome.save(path)
        for case in map(tuple, job["cases"]):
            try:
                outcome.times[case] = bench.time_steps(case, job["warmup"], job["steps"])
            except Exception as error:
                outcome.errors[case] = reason(error)
            if outcome.errors.get(case) == "out of memory":
                torch.get_device_module(bench.runner.device).empty_cache()
            outcome.save(path)
    except Exception as error:
        outcome.error = reason(error)
    outcome.save(path)


def reason(error: Exception) -> str:
    """A line for the column `error`; the traceback goes to the log."""
    if isinstance(error, NoRoom):
        return str(error)
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def run_worker(backend: Backend, job: dict[str, Any], timeout: float) -> Outcome:
    """Run one backend's worker, its output on our stderr."""
    environment = {k: v for k, v in os.environ.items() if k != ENV} | backend.environment
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcome.pt")
        command = [sys.executable, __file__, "--worker", json.dumps({**job, "outcome": str(path)})]
        try:
            status = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=timeout).returncode
            ending = f"the worker ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ending = f"the worker took more than {timeout:g} s"
        outcome = Outcome(**torch.load(path)) if path.exists() else Outcome(error="the worker left nothing")
    outcome.error = ending or outcome.error
    return outcome


def worker_argv(backend: Backend, args: argparse.Namespace) -> list[str]:
    """SGLang's arguments, the same for all backends but for the backend's name; the user's come last and win."""
    cases = [args.profile] if args.profile else args.cases
    batches = sorted({batch for batch, _ in cases} | ({CHECKED_REQUESTS} if args.check else set()))
    return [
        *("--model-path", args.model_path, "--attention-backend", backend.name),
        *("--load-format", "dummy", "--skip-tokenizer-init"),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--disable-prefill-cuda-graph", "--cuda-graph-bs-decode", *map(str, batches)),
        *shlex.split(args.sglang_args),
    ]


def logits_error(logits: Tensor, baseline: Tensor) -> float:
    """Largest ‖a − b‖ / ‖b‖ over steps and requests; NaN if anything is not finite."""
    return float(((logits - baseline).norm(dim=-1) / baseline.norm(dim=-1)).max())


def judge(outcome: Outcome, first: Outcome) -> tuple[float | None, str]:
    """The logits error against the first backend and, if this output must not be trusted, why."""
    if outcome.logits is None:
        return None, outcome.error or "check failed"
    if first.logits is None:
        return None, "check failed: the first backend has no logits"
    error = logits_error(outcome.logits, first.logits)
    # Not `>`: a NaN must fail.
    return error, "" if outcome.finite and error <= LARGEST_LOGITS_ERROR else "check failed"


def make_rows(
    backend: Backend, outcome: Outcome, first: Outcome, cases: Sequence[Case], check: bool = True, **more: Any
) -> list[dict[str, Any]]:
    """CSV rows of one backend; `more` fills further columns. `first` may be `outcome` itself."""
    deviation, failure = judge(outcome, first) if check else (None, "")
    rows = []
    for case in cases:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row.update(
            backend=backend.spec, batch=case[0], context=case[1], machine=outcome.machine or first.machine, **more
        )
        row["logits_error_within_budget"] = "" if deviation is None else f"{deviation:.2g}"
        times = outcome.times.get(case)
        row["error"] = failure or outcome.errors.get(case) or ("" if times else outcome.error or "not run")
        if times and not row["error"]:
            p20, median, p80 = (float(p) for p in np.percentile(times, [20, 50, 80]))
            row.update(step_ms=round(median, 4), p20_ms=round(p20, 4), p80_ms=round(p80, 4))
            row["tokens_per_s"] = round(1e3 * case[0] / median, 1)
            if case in first.times:
                row["ratio"] = round(float(np.median(first.times[case])) / median, 3)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Cases down, backends across: milliseconds a step and the ratio to the first backend."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells: dict[Case, dict[str, str]] = {}
    for row in rows:
        ratio = f" ({row['ratio']:.2f}x)" if row["ratio"] != "" and row["backend"] != backends[0] else ""
        cell = row["error"] or f"{row['step_ms']:.2f}{ratio}"
        cells.setdefault((row["batch"], row["context"]), {})[row["backend"]] = cell
    lines = [["batch", "context", *backends], ["---"] * (2 + len(backends))]
    lines += [[str(b), str(c), *(found.get(name, "") for name in backends)] for (b, c), found in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kernel_table(kernels: list[tuple[str, int, float]], longest: int = 25) -> str:
    """The longest kernels as text, microseconds first."""
    lines = [f"{sum(us for *_, us in kernels):12.1f} us in {sum(n for _, n, _ in kernels)} launches, in all"]
    for name, count, us in kernels[:longest]:
        lines.append(f"{us:12.1f} us {count:6d} x  {name.removeprefix('void ')[:100]}")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a folder; its config.json is enough for dummy weights")
    parser.add_argument(
        "--backends",
        type=parse_backend,
        nargs="+",
        required=True,
        help="fa3, lessismore:key=value,...; first: baseline",
    )
    parser.add_argument("--cases", type=parse_case, nargs="+", default=[], metavar="BxC", help="requests x tokens each")
    parser.add_argument("--steps", type=int, default=24, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument(
        "--shuffle-slots", action="store_true", help="scatter the KV slots as a long-running server does"
    )
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare logits first")
    parser.add_argument("--profile", type=parse_case, metavar="BxC", help="list the kernels of one step; time nothing")
    parser.add_argument(
        "--sglang-args", default="", help="further SGLang arguments, quoted: --sglang-args='--device cpu'"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a backend may take")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    args = parser.parse_args(argv)
    if bool(args.cases) == bool(args.profile):
        parser.error("give either --cases or --profile")
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    args.check = args.check and not args.profile
    return args


def main() -> None:
    """Run every backend's worker in turn; print a table, append rows to `--output`."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    args = parse(sys.argv[1:])
    budgets = [backend.lim.budget for backend in args.backends if backend.lim] or [LimConfig().budget]
    rows: list[dict[str, Any]] = []
    first: Outcome | None = None
    for backend in args.backends:
        worker = worker_argv(backend, args)
        print(f"== {backend.spec}: {backend.command(worker)}", file=sys.stderr)
        job = {
            "argv": worker,
            "shuffle_slots": args.shuffle_slots,
            "warmup": args.warmup,
            "steps": args.steps,
            "cases": args.cases,
            "profile": args.profile,
            "check_context": max(1, min(budgets) // 2) if args.check else 0,
            "sparse_context": 4 * backend.lim.budget if args.check and backend.lim else 0,
        }
        outcome = run_worker(backend, job, args.timeout)
        if args.profile:
            print(f"\n{backend.spec}\n{outcome.error or kernel_table(outcome.kernels)}", flush=True)
            continue
        first = first or outcome
        slots = "shuffled" if args.shuffle_slots else "contiguous"
        more = {"slots": slots, "steps": args.steps, "command": backend.command(worker)}
        found = make_rows(backend, outcome, first, args.cases, args.check, **more)
        if args.output:
            append_rows(args.output, COLUMNS, found)
        rows += found
    if rows:
        print(markdown(rows))


if __name__ == "__main__":
    main()
