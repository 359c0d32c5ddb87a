"""Log-probabilities of what a round answers, where SGLang's result processor looks for them."""

from typing import Any

import torch
from sglang.srt.layers import logprob_processor
from torch import Tensor

from sgl_lim.serving.lossless.accept import Accepted


def attach_logprobs(batch: Any, logits_output: Any, logits: Tensor, accepted: Accepted) -> None:
    """Put log-probabilities of the accepted tokens, and of others that requests ask for, into `logits_output`.

    They are those of ordinary decoding: after penalties, grammar, bias and temperature, before top-k, top-p and min-p.
    If all rows of the batch are greedy, or with SGLANG_RETURN_ORIGINAL_LOGPROB, they are without temperature.

    Args:
        batch: SGLang's ScheduleBatch of the round.
        logits_output: SGLang's LogitsProcessorOutput of the verification. Its `next_token_logprobs` [B, k + 1] is set,
            and the lists of B * (k + 1) places beside it.
        logits: [B * (k + 1), V], as `accept` leaves them.
        accepted: of the same round. Places that do not count get numbers that nobody reads.
    """
    logits_output.next_token_logits = logits
    tokens, width = accepted.tokens.flatten(), accepted.tokens.shape[1]
    # 0.5.23 renamed the function, and takes an argument less.
    compute = getattr(logprob_processor, "compute_spec_logprobs", None)
    places = torch.arange(len(tokens), device=tokens.device).view(-1, width)
    if compute is not None:
        compute(batch, logits_output, tokens, accept_index=places)
    else:
        logprob_processor.compute_spec_v2_logprobs(batch, logits_output, tokens, places, width - 1)
