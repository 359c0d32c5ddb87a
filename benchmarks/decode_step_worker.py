"""The worker of `decode_step.py`: one backend in a process of its own, checked and timed. See there for what is timed.

Written for SGLang 0.5.17's internals (`sglang.benchmark.one_batch`). Nothing in a decode step there waits for the
device, read for fa3, triton and lessismore: lengths that the host needs come from `seq_lens_cpu`, which lies there, and
the greedy sampler leaves its tokens on the device. Other backends may wait; then pipelined steps are partly serial.
"""

import gc
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks import failures
from benchmarks.forest import Forest
from benchmarks.machine import machine_line

CHECKED_STEPS = 2
SomeBench = TypeVar("SomeBench", bound="Bench")


@dataclass
class Outcome:
    """What a worker found, saved before the first and after every case: a crash loses only what comes after it."""

    times: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of each timed step, each alone, by case as it is written."""
    pipelined: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of each timed step, none waited for."""
    errors: dict[str, str] = field(default_factory=dict)
    error: str = ""
    """Why the worker stopped early."""
    logits: Tensor | None = None
    """Within the budget, of all checked batches: (step, request, vocabulary), float32, on the CPU."""
    finite: bool = True
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    """Of one profiled step: name, launches, microseconds in all."""
    machine: str = ""

    def save(self, path: Path) -> None:
        """Replace the file in one move."""
        torch.save(vars(self), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


class NoRoom(Exception):
    """A case exceeds what the message names: the KV or request `pool`, or the model's `context`."""


class Clock:
    """Moments at which a device has finished the work enqueued so far.

    A device without timed events has finished when a call returns: there the moments are the host's.

    Args:
        device: torch's module of the device, as `torch.get_device_module` gives it.
    """

    def __init__(self, device: Any) -> None:
        event = getattr(device, "Event", None)
        # The events of `torch.cpu` carry no time.
        self.event: Any = event if hasattr(event, "elapsed_time") else None

    def mark(self) -> Any:
        """Enqueue a moment; waits for nothing."""
        if self.event is None:
            return time.perf_counter()
        event = self.event(enable_timing=True)
        event.record()
        return event

    def intervals(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds between successive moments; the device must have finished."""
        if self.event is None:
            return [1e3 * (end - begin) for begin, end in pairwise(marks)]
        return [begin.elapsed_time(end) for begin, end in pairwise(marks)]


class Bench:
    """Decode steps of a model runner.

    Args:
        runner: SGLang's; one_batch: its module `sglang.benchmark.one_batch`, whose classes make batches.
        device: torch's module of the runner's device, as `torch.get_device_module` gives it.
        shuffle_slots: whether KV slots are handed out in random order.
    """

    def __init__(self, runner: Any, one_batch: Any, device: Any, *, shuffle_slots: bool) -> None:
        self.runner, self.one_batch, self.shuffle_slots = runner, one_batch, shuffle_slots
        self.synchronize, self.clock = device.synchronize, Clock(device)
        self.sampling: dict[str, float] = {"temperature": 0}

    @classmethod
    def load(cls: type[SomeBench], argv: list[str], shuffle_slots: bool, rank: int = 0, ranks: int = 1) -> SomeBench:
        """A model set up as SGLang's own static benchmark does it, its KV pool filled with noise.

        Of several tensor-parallel ranks it is one's part of the model, on the device of the rank's number.
        """
        from sglang.srt.plugins import load_plugins

        load_plugins()  # the mains that serve do this; a benchmark must do it itself, before flags are parsed
        import sglang.benchmark.one_batch as one_batch
        from sglang.srt.server_args import PortArgs, prepare_server_args

        server_args = prepare_server_args(argv)
        if server_args.tp_size != ranks:
            raise ValueError(
                f"this benchmark has {ranks} ranks, and SGLang was told --tp-size {server_args.tp_size}; the benchmark "
                "itself has to be given --tp-size, if it takes that, and not --sglang-args"
            )
        one_batch._set_envs_and_config(server_args)
        one_batch.initialize_moe_config(server_args)
        one_batch.initialize_fp8_gemm_config(server_args)
        one_batch.initialize_fp4_gemm_config(server_args)
        one_batch.ModelRunner = cls.runner_class(one_batch.ModelRunner, server_args)
        one_batch.get_tokenizer = lambda *args, **options: None  # `load_model` wants one; we send token ids
        wrapped, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), gpu_id=rank, tp_rank=rank)
        runner: Any = wrapped.torch_runner
        bench = cls(runner, one_batch, torch.get_device_module(runner.device), shuffle_slots=shuffle_slots)
        if server_args.load_format == "dummy":
            set_norms_to_one(runner.model)
        for buffer in bench.kv_buffers():
            fill_with_noise(buffer)
        learn_noise(runner)
        # A server's /freeze_gc does this too. A collection in the midst of what is timed takes as long as a few steps.
        gc.collect()
        gc.freeze()
        return bench

    @staticmethod
    def runner_class(original: type, server_args: Any) -> type:
        """The class of the model runner to load."""
        return original

    def kv_buffers(self) -> list[Tensor]:
        """Keys and values of every layer, each (slot, head, dim)."""
        pool = self.runner.token_to_kv_pool
        layers = range(self.runner.model_config.num_hidden_layers)
        return [buffer(layer) for layer in layers for buffer in (pool.get_key_buffer, pool.get_value_buffer)]

    @torch.no_grad()
    def start(self, case: Forest, steps: int) -> tuple[Tensor, Any]:
        """First decode tokens and a batch whose prompts own KV slots. Raises NoRoom if `steps` more do not fit."""
        runner = self.runner
        rows, slots = runner.req_to_token_pool, runner.token_to_kv_pool_allocator
        rows.clear()
        slots.clear()
        page = slots.page_size
        if case.context + steps > runner.model_config.context_len:
            raise NoRoom("context")
        if any(tokens % page for tokens, *_ in case.shared()):
            raise ValueError(f"{case}: SGLang shares whole pages, which hold {page} tokens here")
        pages = case.batch * -(-(case.own + steps) // page) + sum(tokens // page for tokens, *_ in case.shared())
        if case.batch > rows.available_size() or pages * page > slots.available_size():
            raise NoRoom("pool")
        random = np.random.default_rng(0)
        if self.shuffle_slots:
            # A generator of its own: how much it draws depends on the pool's size, and tokens must not.
            order = np.random.default_rng(1).permutation(len(slots.free_pages))
            slots.free_pages = slots.free_pages[torch.from_numpy(order).to(slots.free_pages.device)]
        vocabulary = runner.model_config.vocab_size
        first_tokens = torch.from_numpy(random.integers(0, vocabulary, case.batch)).to(runner.device)
        batch = self.one_batch.ScheduleBatch.init_new(
            reqs=self.requests(case, random, vocabulary),
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=slots,
            tree_cache=self.one_batch.TreeCacheNamespace(
                page_size=page, device=runner.device, token_to_kv_pool_allocator=slots
            ),
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=self.speculation(),
        )
        batch.prepare_for_extend()
        batch.prefill_input_ids_cpu = None
        return first_tokens, batch

    def speculation(self) -> Any:
        """SGLang's speculative algorithm of the batches."""
        return self.one_batch.SpeculativeAlgorithm.NONE

    def requests(self, case: Forest, random: np.random.Generator, vocabulary: int) -> list[Any]:
        """Requests whose shared prefixes are in the cache, and the rest of whose prompts is to be prefilled."""
        prompts: list[list[np.ndarray]] = [[] for _ in range(case.batch)]
        cached: list[list[Tensor]] = [[] for _ in range(case.batch)]
        for tokens, first, end in case.shared():
            drawn, held = random.integers(0, vocabulary, tokens), self.runner.token_to_kv_pool_allocator.alloc(tokens)
            for row in range(first, end):
                prompts[row].append(drawn)
                cached[row].append(held)
        made = []
        for number, (parts, held) in enumerate(zip(prompts, cached, strict=True)):
            prompt = np.concatenate([*parts, random.integers(0, vocabulary, case.own)])
            request = self.one_batch.Req(
                rid=str(number),
                origin_input_text="",
                origin_input_ids=array("q", prompt.astype(np.int64).tobytes()),
                sampling_params=self.one_batch.SamplingParams(**self.sampling, max_new_tokens=1),
            )
            request.full_untruncated_fill_ids = request.origin_input_ids
            request.logprob_start_len = -1
            if held:
                request.prefix_indices = torch.cat(held)
            request.set_extend_range(case.context - case.own, case.context)
            made.append(request)
        return made

    def step(self, tokens: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """One decode step: the sampled tokens and the logits."""
        return self.one_batch.decode(tokens, batch, self.runner)

    def time_alone(self, case: Forest, warmup: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps after `warmup`, on the host between two synchronisations."""
        tokens, batch = self.start(case, warmup + steps)
        times = []
        for _ in range(warmup + steps):
            self.synchronize()
            begin = time.perf_counter()
            tokens, _ = self.step(tokens, batch)
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return times[warmup:]

    def time_pipelined(self, case: Forest, warmup: int, steps: int) -> list[float]:
        """Milliseconds from the end of one step to the end of the next, `steps` after `warmup`; none is waited for."""
        tokens, batch = self.start(case, warmup + steps)
        self.synchronize()
        marks = [self.clock.mark()]
        for _ in range(warmup + steps):
            tokens, _ = self.step(tokens, batch)
            marks.append(self.clock.mark())
        self.synchronize()
        return self.clock.intervals(marks)[warmup:]

    def logits(self, case: Forest, own_noise: bool) -> Tensor:
        """Logits of the checked steps, (step, request, vocabulary) in float32 on the CPU.

        `own_noise` writes keys and values by position in the prompt, so that they are the same for every backend,
        whatever the pool's size and the slots. The tokens are given, not sampled: a tie cannot part two backends.
        """
        tokens, batch = self.start(case, CHECKED_STEPS)
        if own_noise:
            self.write_noise(case, batch)
        found = []
        for _ in range(CHECKED_STEPS):
            found.append(self.step(tokens, batch)[1].float().cpu())
            tokens = tokens.flip(0)
        return torch.stack(found)

    def write_noise(self, case: Forest, batch: Any) -> None:
        """Write the keys and values of a batch's prompts by position."""
        table = self.runner.req_to_token_pool.req_to_token
        # A shared slot is written once, in an order that no slot's number decides.
        held = table[batch.req_pool_indices, : case.context].reshape(-1).tolist()
        slots = torch.tensor(list(dict.fromkeys(held)), device=table.device)
        generator = torch.Generator().manual_seed(0)
        for buffer in self.kv_buffers():
            noise = torch.randn(len(slots), *buffer.shape[1:], generator=generator).to(buffer.dtype)
            # As bytes: not every device can index float8.
            buffer.view(torch.uint8)[slots] = noise.view(torch.uint8).to(buffer.device)

    def kernels(self, case: Forest, warmup: int) -> list[tuple[str, int, float]]:
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


def learn_noise(runner: Any, chunk: int = 1 << 16) -> None:
    """Let a backend whose layers choose pages know them, as prefills would: else all pages score alike."""
    lim = getattr(runner.attn_backend, "lim", None)
    if lim is None or lim.pages is None:
        return
    keys, context = runner.token_to_kv_pool.get_key_buffer(0), runner.model_config.context_len
    # Whole pages of any size have positions in order, and no position is beyond the model's.
    turn = 1 << (context.bit_length() - 1)
    for first in range(0, len(keys), chunk):
        slots = torch.arange(first, min(first + chunk, len(keys)), device=keys.device)
        for layer in range(len(lim.roles)):
            lim.pages.learn(layer, slots, slots % turn)


def fill_with_noise(buffer: Tensor, chunk: int = 1 << 16) -> None:
    """Normal noise in place. Drawn in float32 and in chunks: float8 has no `normal_`, and pools are large."""
    for part in buffer.split(chunk):
        part.copy_(torch.randn(part.shape, device=part.device).to(part.dtype))


def work(job: dict[str, Any]) -> bool:
    """A worker: check, then time or profile, saving the outcome as it grows. Of several ranks the first saves.

    Returns:
        Whether this rank did as much as the others.
    """
    outcome, path = Outcome(), Path(job["outcome"])
    save = partial(outcome.save, path) if job["rank"] == 0 else lambda: None
    try:
        bench = Bench.load(job["argv"], job["shuffle_slots"], job["rank"], job["ranks"])
        outcome.machine = machine_line()
        if job["profile"]:
            outcome.kernels = bench.kernels(Forest.parse(job["profile"]), job["warmup"])
        if job["checked"]:
            outcome.logits = torch.cat([bench.logits(case, True) for case in map(Forest.parse, job["checked"])], dim=1)
            outcome.finite = bool(outcome.logits.isfinite().all())
        if job["sparse"]:
            outcome.finite &= bool(bench.logits(Forest.parse(job["sparse"]), own_noise=False).isfinite().all())
        save()
        # Only now: a sampler that is not greedy leaves probabilities where the logits were.
        if "sampling" in job:
            bench.sampling = job["sampling"]
        for name in job["cases"]:
            time_case(bench, name, job, outcome)
            save()
    except Exception as error:
        outcome.error = reason(error)
    save()
    return not outcome.error


def time_case(bench: Bench, name: str, job: dict[str, Any], outcome: Outcome) -> None:
    """Fill an outcome with one case."""
    case = Forest.parse(name)
    try:
        alone = bench.time_alone(case, job["warmup"], job["steps"])
        outcome.pipelined[name] = bench.time_pipelined(case, job["warmup"], job["steps"])
        outcome.times[name] = alone
    except Exception as error:
        outcome.errors[name] = reason(error)
        # All ranks find that there is no room. After anything else they would no longer be at the same step.
        if job["ranks"] > 1 and not isinstance(error, NoRoom):
            raise
    if outcome.errors.get(name) == "out of memory":
        torch.get_device_module(bench.runner.device).empty_cache()


def reason(error: Exception) -> str:
    """A line for the column `error`; a case without room is no failure, and has no traceback."""
    return str(error) if isinstance(error, NoRoom) else failures.reason(error)
