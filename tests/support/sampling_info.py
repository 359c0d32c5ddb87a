"""A stand-in for SGLang's `SamplingBatchInfo`, from plain numbers."""

from types import SimpleNamespace

import torch
from torch import Tensor

TOP_K_ALL = 1 << 30


def sampling_info(
    temperature: list[float],
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
    logit_bias: Tensor | None = None,
) -> SimpleNamespace:
    """Of as many rows as there are temperatures. Temperature 0 is greedy, as SGLang's `SamplingParams` have it."""
    rows = len(temperature)
    greedy = [t == 0 for t in temperature]
    top_k = [1 if g else k for g, k in zip(greedy, top_k or [TOP_K_ALL] * rows, strict=True)]
    top_p, min_p = top_p or [1.0] * rows, min_p or [0.0] * rows
    return SimpleNamespace(
        temperatures=torch.tensor([[1.0 if g else t] for g, t in zip(greedy, temperature, strict=True)]),
        top_ks=torch.tensor(top_k, dtype=torch.int32),
        top_ps=torch.tensor(top_p),
        min_ps=torch.tensor(min_p),
        is_all_greedy=all(k <= 1 for k in top_k),
        is_any_greedy=any(k <= 1 for k in top_k),
        need_top_k_sampling=any(k != TOP_K_ALL for k in top_k),
        need_top_p_sampling=any(p != 1.0 for p in top_p),
        need_min_p_sampling=any(p > 0 for p in min_p),
        logit_bias=logit_bias,
        has_custom_logit_processor=False,
    )
