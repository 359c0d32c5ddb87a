"""The worker of `lossless.py`: rounds of the lossless mode in a process of its own. See there for what is timed.

The speculative worker is the server's own, on SGLang 0.5.17's model runner. What the scheduler does between rounds is
done here in its order: slots are reserved, a round is launched, and only then the host looks at the round before.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_step_worker import CHECKED_STEPS, Bench, Outcome, reason
from benchmarks.forest import Forest
from benchmarks.machine import machine_line

PARTS_REPEATS = 12


@dataclass
class LosslessOutcome(Outcome):
    """What rounds took, beside an Outcome's checks."""

    rounds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By `case acceptance`: `ms` and `drafts` of each timed round, and `accepted`, accepted drafts a request."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """By case: milliseconds of a draft step, of drawing its token, of a verification, of accepting, of a plain step."""


class LosslessBench(Bench):
    """Rounds by the server's own speculative worker."""

    @staticmethod
    def runner_class(original: type, server_args: Any) -> type:
        """A model runner that makes the worker, and its backends and graphs after its own, as the scheduler does."""
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        make: Any = SpeculativeAlgorithm.from_string(server_args.speculative_algorithm).create_worker(server_args)

        class Runner(original):
            def __init__(self, **given: Any) -> None:
                super().__init__(**given)
                target = SimpleNamespace(model_runner=self)
                self.lossless = make(server_args=server_args, gpu_id=self.gpu_id, nccl_port=0, target_worker=target)

            def init_attention_backends(self) -> None:
                super().init_attention_backends()
                self.lossless.init_attention_backends()

            def init_cuda_graphs(self, *given: Any, **named: Any) -> None:
                super().init_cuda_graphs(*given, **named)
                self.lossless.init_cuda_graphs()

        return Runner

    def speculation(self) -> Any:
        """The lossless mode."""
        return self.one_batch.SpeculativeAlgorithm.from_string(self.runner.server_args.speculative_algorithm)

    @property
    def worker(self) -> Any:
        """The speculative worker."""
        return self.runner.lossless

    def begin(self, case: Forest, tokens: int) -> Any:
        """A batch whose prompts own KV slots, and which is to decode so many tokens."""
        from sgl_lim.serving.lossless.rounds import DraftInput

        first, batch = self.start(case, tokens)
        batch.spec_info = DraftInput(first)
        return batch

    def launch(self, batch: Any) -> Any:
        """One round, as the scheduler runs it; nothing is waited for, unless a backend wants lengths on the host."""
        batch.prepare_for_decode()
        backends = self.worker.spec_v2_attn_backends
        on_host = any(getattr(backend, "needs_cpu_seq_lens", True) for backend in backends)
        batch.seq_lens_cpu = batch.seq_lens.cpu() if on_host else None
        whole = batch.sampling_info
        batch.sampling_info = whole.copy_for_forward()
        result = self.worker.forward_batch_generation(batch)
        batch.sampling_info = whole
        batch.seq_lens, batch.spec_info = result.new_seq_lens, result.next_draft_input
        return result

    def look_at(self, batch: Any, lens: Tensor) -> list[int]:
        """What the scheduler does with a round's accepted tokens, int32 [B] on the host: commit them, and tell."""
        counts: list[int] = lens.tolist()
        for request, count in zip(batch.reqs, counts, strict=True):
            request.kv_committed_len += count
        self.worker.on_verify_complete_cpu([count - 1 for count in counts], batch_size=len(counts))
        return counts

    @torch.no_grad()
    def time_rounds(self, case: Forest, acceptance: float, warmup: int, steps: int) -> dict[str, Any]:
        """Rounds with drawn acceptance, none waited for before the next is launched.

        Returns:
            As `LosslessOutcome.rounds`.
        """
        from sgl_lim.serving.lossless.cost import Acceptance

        worker, most = self.worker, self.worker.speculative_num_steps
        worker._sampler.drawn_acceptance = acceptance
        # As if so many drafts had been seen already.
        worker._chooser.acceptance = Acceptance(acceptance * 1024, 1024.0)
        worker._in_flight.clear()
        batch = self.begin(case, (warmup + steps + 3) * (most + 1))
        self.synchronize()
        marks, drafts, accepted, pending = [self.clock.mark()], [], [], None
        for _ in range(warmup + steps):
            result = self.launch(batch)
            marks.append(self.clock.mark())
            drafts.append(result.speculative_num_draft_tokens - 1)
            if pending is not None:
                accepted += self._arrived(batch, *pending)
            pending = self._departs(result.accept_lens)
        self.synchronize()
        accepted += self._arrived(batch, *pending)  # type: ignore[misc]
        return {
            "ms": self.clock.intervals(marks)[warmup:],
            "drafts": drafts[warmup:],
            "accepted": sum(accepted) / len(accepted) - 1,
        }

    def _departs(self, lens: Tensor) -> tuple[Tensor, Any]:
        """Accepted tokens on their way to the host, and the moment at which they have arrived."""
        on_host = torch.empty(lens.shape, dtype=lens.dtype, pin_memory=lens.is_cuda)
        on_host.copy_(lens, non_blocking=True)
        return on_host, self.clock.mark()

    def _arrived(self, batch: Any, on_host: Tensor, moment: Any) -> list[int]:
        if self.clock.event is not None:
            moment.synchronize()
        return self.look_at(batch, on_host)

    @torch.no_grad()
    def time_parts(self, case: Forest) -> dict[str, float]:
        """As `LosslessOutcome.parts`: medians over repeats that are launched without waiting, each part by itself."""
        from sgl_lim.serving.lossless.rounds import decode_batch, rows_of, verify_batch

        worker, most = self.worker, self.worker.speculative_num_steps
        worker._sampler.drawn_acceptance = None
        batch, passes, runner = self.begin(case, 3 * (most + 1)), worker._passes, self.runner
        batch.prepare_for_decode()
        table, bonus = runner.req_to_token_pool.req_to_token, batch.spec_info.bonus_tokens
        rows = rows_of(batch, table, most, most)
        run = bonus[:, None].expand(-1, most + 1).contiguous()
        logits = passes.verify[most].run(runner, verify_batch(rows, run)).logits_output.next_token_logits.clone()

        def sampling() -> Any:
            return worker._sampler.begin(batch, bonus, rows.lens, most)

        drafted = passes.draft.run(runner, decode_batch(rows, bonus, 0)).logits_output.next_token_logits.clone()
        found = {"verify_ms": self._median(lambda: passes.verify[most].run(runner, verify_batch(rows, run)))}
        found["draft_ms"] = self._median(lambda: passes.draft.run(runner, decode_batch(rows, bonus, 0)))
        found["plain_ms"] = self._median(lambda: passes.plain.run(runner, decode_batch(rows, bonus, 0)))
        found["draw_ms"] = self._median(lambda: sampling().draft(drafted))
        whole = sampling()
        for _ in range(most):
            whole.draft(drafted)
        found["accept_ms"] = self._median(lambda: whole.verify(logits))
        return found

    def _median(self, part: Callable[[], Any]) -> float:
        """Milliseconds of a part, launched again and again."""
        part()
        self.synchronize()
        marks = [self.clock.mark()]
        for _ in range(PARTS_REPEATS):
            part()
            marks.append(self.clock.mark())
        self.synchronize()
        return float(torch.tensor(self.clock.intervals(marks)).median())

    @torch.no_grad()
    def verified_logits(self, case: Forest) -> Tensor:
        """Logits of a verification, where `Bench.logits` decodes: (step, request, vocabulary), float32, on the CPU."""
        from sgl_lim.serving.lossless.rounds import rows_of, verify_batch

        most = self.worker.speculative_num_steps
        batch = self.begin(case, 2 * (most + 1))
        self.write_noise(case, batch)
        batch.prepare_for_decode()
        rows = rows_of(batch, self.runner.req_to_token_pool.req_to_token, most, most)
        first = batch.spec_info.bonus_tokens
        run = torch.stack([first.flip(0) if place % 2 else first for place in range(most + 1)], dim=1)
        out = self.worker._passes.verify[most].run(self.runner, verify_batch(rows, run))
        logits = out.logits_output.next_token_logits.view(case.batch, most + 1, -1)
        return logits[:, :CHECKED_STEPS].transpose(0, 1).float().cpu()


def work(job: dict[str, Any]) -> None:
    """A worker: check, then time, saving the outcome as it grows."""
    outcome, path = LosslessOutcome(), Path(job["outcome"])
    try:
        begin = time.perf_counter()
        bench = LosslessBench.load(job["argv"], job["shuffle_slots"])
        bench.sampling = job["sampling"]
        print(f"loaded in {time.perf_counter() - begin:.0f} s", flush=True)
        outcome.machine = machine_line()
        if job["checked"]:
            outcome.logits = torch.cat(
                [bench.verified_logits(case) for case in map(Forest.parse, job["checked"])], dim=1
            )
            outcome.finite = bool(outcome.logits.isfinite().all())
        outcome.save(path)
        for name in job["cases"]:
            time_case(bench, name, job, outcome)
            outcome.save(path)
    except Exception as error:
        outcome.error = reason(error)
    outcome.save(path)


def time_case(bench: LosslessBench, name: str, job: dict[str, Any], outcome: LosslessOutcome) -> None:
    """Fill an outcome with one case."""
    case = Forest.parse(name)
    try:
        outcome.parts[name] = bench.time_parts(case)
        for acceptance in job["acceptance"]:
            found = bench.time_rounds(case, acceptance, job["warmup"], job["steps"])
            outcome.rounds[f"{name} {acceptance}"] = found
    except Exception as error:
        outcome.errors[name] = reason(error)
        with suppress(RuntimeError, AttributeError):
            torch.get_device_module(bench.runner.device).empty_cache()
