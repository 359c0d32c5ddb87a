"""Random weights under which attention is peaked, so that a wrong set changes what a model says."""

import torch


@torch.no_grad()
def draw_wide(model: torch.nn.Module, qk_norms: float | None = None) -> None:
    """Draw all matrices anew, wider than a model is initialised.

    Args:
        qk_norms: what the norms of queries and keys multiply by; None leaves them.
    """
    for name, weight in model.named_parameters():
        if weight.dim() in (2, 3):  # 3: those of experts
            weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
        if qk_norms is not None and ("q_norm" in name or "k_norm" in name):
            weight.fill_(qk_norms)
