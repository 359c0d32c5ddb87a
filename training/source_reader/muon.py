"""Muon (K. Jordan et al., 2024) for matrices, AdamW for what is left, under one learning-rate factor.

Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by five Newton-Schulz steps. Matrices of
one size go through them as one batch: a dozen layers then cost a few dozen launches, not a few thousand.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ in [N, rows, columns]; singular values end between 0.7 and 1.2. bfloat16."""
    a, b, c = QUINTIC
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, for lists of equally shaped matrices; decoupled weight decay."""

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(matrix.shape)].append(matrix)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.lr, self.momentum, self.decay = lr, momentum, decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the gradients at `factor` times the learning rate."""
        lr = self.lr * factor
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradients = torch.stack([w.grad for w in group if w.grad is not None])
            momentum.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(momentum, self.momentum)).float()
            # Tall matrices get the same change of their outputs a row.
            scale = max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * scale)


class Optimiser:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, lr: float, adam_lr: float) -> None:
        self.muon = Muon(matrices, lr=lr)
        fused = others[0].device.type == "cuda"
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.adam_lr = adam_lr
        self._all = [*matrices, *others]

    def step(self, factor: float) -> None:
        """Clip gradients to norm 1, update at `factor` times the learning rates, drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self._all, 1.0)
        self.muon.step(factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for weight in self._all:
            weight.grad = None

    def state_dict(self) -> dict[str, object]:
        """Momenta and AdamW's state."""
        return {"momenta": self.muon.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take a state of a model of the same shape."""
        for mine, given in zip(self.muon.momenta, state["momenta"], strict=True):
            mine.copy_(given)
        self.adam.load_state_dict(state["adam"])
