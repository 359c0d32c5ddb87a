"""What a round of the lossless mode runs the model on, and what it hands to the next round."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType, SpeculativeAlgorithm
from torch import Tensor

from sgl_lim.serving.lossless import versions


@dataclass
class DraftInput(SpecInput):
    """What a round hands to the next: of each request the token that has been decided and has no KV yet.

    SGLang relays the token by the request's row under the overlap scheduler, and this object by itself without.
    """

    bonus_tokens: Tensor  # int64 [B]
    future_indices: Tensor | None = field(default=None, kw_only=True)
    """Rows of the request pool by which SGLang relays the tokens; set once it does, and `bonus_tokens` is stale."""

    capture_hidden_mode: ClassVar[CaptureHiddenMode] = CaptureHiddenMode.NULL
    topk_p: ClassVar[None] = None
    topk_index: ClassVar[None] = None
    hidden_states: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.EAGLE_DRAFT)

    def filter_batch(self, new_indices: Tensor, new_indices_cpu: Any = None, **_: Any) -> None:
        """Keep the requests of these places."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
        else:
            self.bonus_tokens = self.bonus_tokens[new_indices]

    def merge_batch(self, other: "DraftInput") -> None:
        """Append another batch's requests."""
        if self.future_indices is not None:
            assert other.future_indices is not None
            self.future_indices = torch.cat([self.future_indices, other.future_indices])
        else:
            self.bonus_tokens = torch.cat([self.bonus_tokens, other.bonus_tokens])


@dataclass(frozen=True)
class Rows:
    """The requests of a round: who they are and where their next tokens go."""

    indices: Tensor  # int64 [B], rows of the request pool
    lens: Tensor  # int64 [B], tokens with KV, C of each row
    lens_cpu: Tensor  # int64 [B] on the host: `lens`, or where SGLang has them on the device alone, no less than these
    positions: Tensor  # int64 [B, k + 1], C to C + k
    slots: Tensor  # int64 [B, k + 1], KV slots of these positions

    @property
    def size(self) -> int:
        """Requests in the round."""
        return len(self.lens)

    def first(self, drafts: int) -> "Rows":
        """The same with room for fewer drafts."""
        width = drafts + 1
        return Rows(self.indices, self.lens, self.lens_cpu, self.positions[:, :width], self.slots[:, :width])


def rows_of(batch: Any, table: Tensor, drafts: int, most: int) -> Rows:
    """The rows of a round that drafts so many tokens.

    Args:
        batch: SGLang's ScheduleBatch, with slots for `drafts` + 1 tokens behind `seq_lens`.
        table: int32 [R, T], SGLang's `ReqToTokenPool.req_to_token`.
        most: drafts of a round at most, for which SGLang reserved slots.
    """
    lens = batch.seq_lens.to(torch.int64)
    positions = lens[:, None] + torch.arange(drafts + 1, device=lens.device)
    indices = batch.req_pool_indices.to(torch.int64)
    slots = table[indices[:, None], positions].to(torch.int64)
    return Rows(indices, lens, _on_host(batch, most), positions, slots)


def _on_host(batch: Any, most: int) -> Tensor:
    """Lengths of a batch on the host, or a bound of them, without a wait for the device.

    Under the overlap scheduler the host may be a round behind. It has then reserved slots for two rounds.
    """
    if batch.seq_lens_cpu is not None:
        return batch.seq_lens_cpu.to(torch.int64)
    return torch.tensor([versions.kv_of(req)[1] - (most + 1) for req in batch.reqs], dtype=torch.int64)


def decode_batch(rows: Rows, tokens: Tensor, step: int) -> ForwardBatch:
    """A decode step at position C + `step` of each row; tokens: int64 [B]."""
    lens = rows.lens + (step + 1)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=tokens,
        seq_lens=lens,
        orig_seq_lens=lens,
        out_cache_loc=rows.slots[:, step].contiguous(),
        positions=rows.positions[:, step].contiguous(),
        spec_info=None,
        **_common(rows, rows.lens_cpu + (step + 1)),
    )


def verify_batch(rows: Rows, tokens: Tensor) -> ForwardBatch:
    """A pass over the last decided token and all drafts, int64 [B, k + 1]."""
    positions = rows.positions.flatten()
    spec_info = DFlashVerifyInput(
        draft_token=tokens.flatten(),
        positions=positions,
        draft_token_num=tokens.shape[1],
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        input_ids=spec_info.draft_token,
        seq_lens=rows.lens,
        orig_seq_lens=rows.lens,
        out_cache_loc=rows.slots.flatten(),
        positions=positions,
        spec_info=spec_info,
        **_common(rows, rows.lens_cpu),
    )


def _common(rows: Rows, lens_cpu: Tensor) -> dict[str, Any]:
    """What all batches of a round say of its rows; `lens_cpu` int64 [B]: lengths on the host."""
    return {
        "batch_size": rows.size,
        "req_pool_indices": rows.indices,
        "seq_lens_cpu": lens_cpu,
        "seq_lens_sum": int(lens_cpu.sum()),
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
    }
