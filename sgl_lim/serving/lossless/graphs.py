"""CUDA graphs of the passes of a round: verification of a chain, and decode steps beside it.

SGLang's `DecodeCudaGraphRunner` captures verification alone where a speculative algorithm is on. These two say of
themselves what they capture. Everything else (buffers, padding, replay) is SGLang's. All graphs share SGLang's static
input buffers and its buffer of logits, so what a pass returns has to be used before the next pass runs.
"""

from typing import Any

from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.speculative.dflash_info import DFlashVerifyInput


class VerifyGraph(DecodeCudaGraphRunner):
    """Graphs of a pass over a chain of tokens a row, as many as `captured_req_width`."""

    def get_spec_info(self, num_tokens: int) -> DFlashVerifyInput:
        """A chain without a mask is causal in FA3, FlashInfer and Triton, in both releases."""
        return DFlashVerifyInput(
            draft_token=None,
            positions=None,
            draft_token_num=self.captured_req_width,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )


class DecodeGraph(DecodeCudaGraphRunner):
    """Graphs of a decode step, where SGLang would capture verification."""

    def __init__(self, model_runner: Any, *, attn_backend: Any) -> None:
        super().__init__(model_runner, attn_backend=attn_backend, speculative_num_draft_tokens=1)

    @property
    def capture_forward_mode(self) -> ForwardMode:
        """A decode step, whatever the algorithm."""
        return ForwardMode.DECODE

    @capture_forward_mode.setter
    def capture_forward_mode(self, mode: ForwardMode) -> None:
        """SGLang's constructor sets verification, which this is not."""

    def get_spec_info(self, num_tokens: int) -> None:
        """Nothing beyond a decode step."""
        return
