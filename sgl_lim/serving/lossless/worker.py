"""The speculative worker of the lossless mode: one model, one KV pool, sparse drafts and a dense verification."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from torch import Tensor

from lim_patches.no_token_left import FOUND
from sgl_lim.serving import metrics
from sgl_lim.serving.lossless import versions
from sgl_lim.serving.lossless.accept import Accepted
from sgl_lim.serving.lossless.cost import Chooser
from sgl_lim.serving.lossless.distributions import compile_filters
from sgl_lim.serving.lossless.draft_backend import make_draft_backend
from sgl_lim.serving.lossless.grammar import RunGrammar
from sgl_lim.serving.lossless.logprobs import attach_logprobs
from sgl_lim.serving.lossless.measure import Meter
from sgl_lim.serving.lossless.passes import Passes, backends_of, capture, most_rows
from sgl_lim.serving.lossless.rounds import DraftInput, Rows, decode_batch, rows_of, verify_batch
from sgl_lim.serving.lossless.run_sampler import RunSampler, RunSampling
from sgl_lim.serving.tally import Tally
from sgl_lim.settings.flags import load

Publish = Callable[[Tensor], None]


class SelfSpecWorker(BaseSpecWorker):
    """Drafts and verifies with the target's own runner.

    A round of a batch whose requests have C tokens of KV each: k decode steps draft from the last decided token on,
    into the KV slots C to C + k - 1. One pass over that token and the drafts then computes what the model says after
    each of them. It writes the slots C to C + k anew, so that all KV that stays is the dense model's. What is accepted
    is committed by the scheduler; slots of rejected drafts are written again in the next round.

    Where drafting would not win, a round is one dense decode step.
    """

    _passes: Passes
    _chooser: Chooser
    _sampler: RunSampler

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **_: Any) -> None:
        super().__init__()
        self._target_worker = target_worker
        self._runner = target_worker.model_runner
        self._draft_worker = versions.draft_worker_of(self._runner)
        self.speculative_num_steps = versions.draft_steps()
        self.speculative_num_draft_tokens = self.speculative_num_steps + 1
        self._config, most = load(), self.speculative_num_steps
        # Where few drafts are accepted, half as many lose less.
        self._counts = sorted({-(-most // 2), most}) if self._config.vary_drafts else [most]
        self._in_flight: deque[tuple[int, int]] = deque()
        self._tally = Tally()
        if self._runner.device == "cuda":
            self._runner._decode_cuda_graph_runner_cls = _verify_graph

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        """The backends that run in a round."""
        passes = self._passes
        return (passes.draft.backend, passes.plain.backend, *(one.backend for one in passes.verify.values()))

    def alloc_memory_pool(self, *args: Any, **pools: Any) -> None:
        """Drafts write the target's pool."""

    def init_attention_backends(self) -> None:
        """Build the backends of all passes, after the target's own."""
        runner = self._runner
        config, target = self._config, runner.attn_backend
        draft_backend = make_draft_backend(
            runner, target, guided=config.drafts == "guided", branches_once=config.verify_groups
        )
        self._passes = backends_of(runner, draft_backend, self._counts)

    def init_cuda_graphs(self) -> None:
        """Capture the passes beside the target's verification, and measure what all of them cost."""
        runner = self._runner
        self._passes, memory, seconds = capture(runner, self._passes)
        self._additional_graph_memory_usage.update(memory)
        self._additional_graph_time_usage.update(seconds)
        if runner.device == "cuda":
            from sgl_lim.serving.lossless.reservations import compile_reservations

            table, page = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool.page_size
            compile_reservations(table, page, runner.max_running_requests)
        most = most_rows(runner, self._passes)
        costs = versions.agreed(Meter(runner, self._passes, most).measure()) if self._config.vary_drafts else None
        self._chooser = Chooser(self._counts, costs, most_rows=most)
        flashinfer = runner.server_args.sampling_backend == "flashinfer"
        if flashinfer and runner.device == "cuda":
            compile_filters(runner.device)
        self._sampler = RunSampler(
            runner.model_config.vocab_size,
            runner.device,
            versions.tensor_parallel_group(),
            flashinfer=flashinfer,
            drawn_acceptance=self._config.drawn_acceptance,
        )
        metrics.announce_lossless(self._tally, self._counts, self._config)

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """The target's weights are all there are."""
        return True, "Succeeded to update model weights."

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        """The target's weights are all there are."""
        return True, "Succeeded to update model weights."

    def update_weights_from_tensor(self, recv_req: Any) -> tuple[bool, str]:
        """SGLang asks the speculative worker alone."""
        updated: tuple[bool, str] = self._target_worker.update_weights_from_tensor(recv_req)
        return updated

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: Sequence[int], batch_size: int = 0) -> None:
        """SGLang has looked at the results of a round, and says how many drafts of each request were accepted."""
        while self._in_flight:
            drafts, rows = self._in_flight.popleft()
            if rows == len(num_correct_drafts_per_req):
                self._tally.learn(drafts, num_correct_drafts_per_req)
                if drafts:
                    self._chooser.acceptance.learn(num_correct_drafts_per_req, drafts)
                return

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Publish | None = None,
        grammar_barrier: Callable[[], None] | None = None,
        pp_proxy_tensors: None = None,
    ) -> GenerationBatchResult:
        """Run a prefill, or one round.

        Args:
            batch: SGLang's ScheduleBatch.
            on_publish: takes the lengths, int64 [B], as soon as they are known, under the overlap scheduler.
            grammar_barrier: advances grammars by what the round before has answered, under the overlap scheduler.
            pp_proxy_tensors: of a pipeline stage before, which there is none of; 0.5.23 says so.
        """
        if batch.forward_mode.is_decode():
            return self._round(batch, on_publish, grammar_barrier)
        if batch.forward_mode.is_extend():
            return self._prefill(batch, on_publish)
        raise RuntimeError(f"the lossless mode runs prefills and decode steps, got {batch.forward_mode}")

    def _prefill(self, batch: Any, on_publish: Publish | None) -> GenerationBatchResult:
        self._sampler.prefill(batch.reqs)
        result = self._target_worker.forward_batch_generation(batch)
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = DraftInput(result.next_token_ids.to(torch.int64))
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        return result

    def _round(
        self, batch: Any, on_publish: Publish | None, grammar_barrier: Callable[[], None] | None
    ) -> GenerationBatchResult:
        drafts = self._drafts_of(batch)
        self._in_flight.append((drafts, len(batch.reqs)))
        rows = rows_of(batch, self._runner.req_to_token_pool.req_to_token, drafts, self.speculative_num_steps)
        bonus = batch.spec_info.bonus_tokens.to(torch.int64)
        sampling = self._sampler.begin(batch, bonus, rows.lens, drafts)
        self._draft(rows, bonus, sampling, drafts)
        forward_batch = verify_batch(rows, sampling.run) if drafts else decode_batch(rows, bonus, 0)
        out, accepted = self._verify(batch, forward_batch, sampling, grammar_barrier)
        new_lens = rows.lens + accepted.accept_lens
        if on_publish is not None:
            on_publish(new_lens)
        if drafts:
            lim = self._passes.plain.backend.lim
            lim.counters.record_round(rows.indices, rows.lens, accepted.accept_lens, drafts, lim.drafts)
        if batch.return_logprob:
            attach_logprobs(batch, out.logits_output, out.logits_output.next_token_logits, accepted)
        return GenerationBatchResult(
            logits_output=out.logits_output,
            next_token_ids=accepted.tokens.flatten(),
            accept_lens=accepted.accept_lens,
            new_seq_lens=new_lens,
            next_draft_input=DraftInput(accepted.bonus),
            speculative_num_draft_tokens=drafts + 1,
            can_run_cuda_graph=out.can_run_graph,
            extra_keep_alive_refs=[forward_batch, rows, sampling],
        )

    def _verify(
        self, batch: Any, forward_batch: Any, sampling: RunSampling, grammar_barrier: Callable[[], None] | None
    ) -> tuple[Any, Accepted]:
        """Run the dense pass of a round, and accept: SGLang's output of the pass, and what the rows answer."""
        drafts = sampling.drafts.shape[1]
        run = forward_batch.input_ids.view(-1, drafts + 1)
        grammar = RunGrammar(batch, run) if batch.has_grammar else None
        out = (self._passes.verify[drafts] if drafts else self._passes.plain).run(self._runner, forward_batch)
        mask = None if grammar is None else grammar.mask(grammar_barrier)
        accepted = sampling.verify(out.logits_output.next_token_logits, mask)
        # By this, requests end whose answer has no token where it would go on.
        setattr(out.logits_output, FOUND, accepted.without_token)
        return out, accepted

    def _drafts_of(self, batch: Any) -> int:
        """How many tokens the round of a batch drafts, by what the host knows of it."""
        lengths = [versions.kv_of(req) for req in batch.reqs]
        # What SGLang reserved reaches beyond the context, for which dense backends have no places.
        ends = max(reserved for _, reserved in lengths) > self._runner.model_config.context_len
        if ends or self._sampler.needs_plain_round(batch):
            return 0
        return self._chooser.choose(len(lengths), sum(committed for committed, _ in lengths))

    def _draft(self, rows: Rows, bonus: Tensor, sampling: RunSampling, drafts: int) -> None:
        """Draw the drafts of a round, each from a decode step behind the one before."""
        token = bonus
        for step in range(drafts):
            out = self._passes.draft.run(self._runner, decode_batch(rows, token, step))
            token = sampling.draft(out.logits_output.next_token_logits)
        if drafts:
            versions.forget_read_done(self._runner)


def _verify_graph() -> type:
    from sgl_lim.serving.lossless.graphs import VerifyGraph

    return VerifyGraph
