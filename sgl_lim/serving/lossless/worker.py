"""The speculative worker of the lossless mode: one model, one KV pool, sparse drafts and a dense verification."""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from torch import Tensor

from sgl_lim.serving.lossless import versions
from sgl_lim.serving.lossless.rounds import DraftInput, decode_batch, rows_of, verify_batch

Publish = Callable[[Tensor], None]


class SelfSpecWorker(BaseSpecWorker):
    """Drafts and verifies with the target's own runner.

    A round of a batch whose requests have C tokens of KV each: k decode steps draft from the last decided token on,
    into the KV slots C to C + k - 1. One pass over that token and the drafts then computes what the model says after
    each of them. It writes the slots C to C + k anew, so that all KV that stays is the dense model's. What is accepted
    is committed by the scheduler; slots of rejected drafts are written again in the next round.
    """

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **_: Any) -> None:
        super().__init__()
        self._target_worker = target_worker
        self._draft_worker = versions.draft_worker_of(target_worker.model_runner)
        self._runner = target_worker.model_runner
        self.speculative_num_steps: int = server_args.speculative_num_steps
        self.speculative_num_draft_tokens: int = server_args.speculative_num_draft_tokens

    def alloc_memory_pool(self, *args: Any, **pools: Any) -> None:
        """Drafts write the target's pool."""

    def init_attention_backends(self) -> None:
        """Nothing beside the target's."""

    def init_cuda_graphs(self) -> None:
        """Nothing beside the target's."""

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """The target's weights are all there are."""
        return True, "Succeeded to update model weights."

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        """The target's weights are all there are."""
        return True, "Succeeded to update model weights."

    def forward_batch_generation(
        self, batch: Any, on_publish: Publish | None = None, grammar_barrier: Any = None
    ) -> GenerationBatchResult:
        """Run a prefill, or one round.

        Args:
            batch: SGLang's ScheduleBatch.
            on_publish: takes the lengths, int64 [B], as soon as they are known, under the overlap scheduler.
        """
        if batch.forward_mode.is_decode():
            return self._round(batch, on_publish)
        if batch.forward_mode.is_extend():
            return self._prefill(batch, on_publish)
        raise RuntimeError(f"the lossless mode runs prefills and decode steps, got {batch.forward_mode}")

    def _prefill(self, batch: Any, on_publish: Publish | None) -> GenerationBatchResult:
        result = self._target_worker.forward_batch_generation(batch)
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = DraftInput(result.next_token_ids.to(torch.int64))
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        return result

    def _round(self, batch: Any, on_publish: Publish | None) -> GenerationBatchResult:
        drafts = self.speculative_num_steps
        rows = rows_of(batch, self._runner.req_to_token_pool.req_to_token, drafts)
        tokens = [batch.spec_info.bonus_tokens.to(torch.int64)]
        for step in range(drafts):
            out = self._runner.forward(decode_batch(rows, tokens[-1], step))
            tokens.append(out.logits_output.next_token_logits.argmax(-1))
        run = torch.stack(tokens, dim=1)
        versions.forget_read_done(self._runner)
        forward_batch = verify_batch(rows, run)
        out = self._runner.forward(forward_batch)
        logits = out.logits_output.next_token_logits.view(*run.shape, -1)
        best = logits.argmax(-1)
        accept_lens = 1 + (best[:, :-1] == run[:, 1:]).cumprod(1).sum(1)
        bonus = best.gather(1, accept_lens[:, None] - 1)[:, 0]
        new_lens = rows.lens + accept_lens
        if on_publish is not None:
            on_publish(new_lens)
        return GenerationBatchResult(
            logits_output=out.logits_output,
            next_token_ids=best.to(torch.int32).flatten(),
            accept_lens=accept_lens.to(torch.int32),
            new_seq_lens=new_lens,
            next_draft_input=DraftInput(bonus),
            speculative_num_draft_tokens=drafts + 1,
            can_run_cuda_graph=out.can_run_graph,
            extra_keep_alive_refs=[forward_batch, rows],
        )
