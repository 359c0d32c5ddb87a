"""Brute-force oracles in plain Python and float64, written from the paper's words and independent of `lim_kernels`."""

import math

import torch
from torch import Tensor


def union_set(logits: Tensor, length: int, *, budget: int, recent: int, sinks: int) -> list[int]:
    """Ascending positions that LessIsMore keeps for one row: logits [H, L], ties to the lower position."""
    if length <= budget:
        return list(range(length))
    rows = logits.tolist()
    middle = budget - recent - sinks
    candidates = range(sinks, length - recent)
    lists = [sorted(candidates, key=lambda t, row=row: (-row[t], t))[:middle] for row in rows]
    union: list[int] = []
    for rank in range(middle):
        for ranked in lists:
            if ranked[rank] not in union:
                union.append(ranked[rank])
    return sorted([*range(sinks), *union[:middle], *range(length - recent, length)])


def aggregate_scores(logits: Tensor, length: int, how: str) -> list[float]:
    """Per token, the max or sum over heads of the softmax over the whole row, in float64."""
    totals = [0.0] * length
    for row in logits[:, :length].double().tolist():
        peak = max(row)
        weights = [math.exp(x - peak) for x in row]
        norm = sum(weights)
        for t, weight in enumerate(weights):
            share = weight / norm
            totals[t] = max(totals[t], share) if how == "max" else totals[t] + share
    return totals


def attention(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float, logit_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One row in float64: q [H, D], keys [K, H_kv, D], values [K, H_kv, D_v] → out [H, D_v], lse [H]."""
    heads, kv_heads = q.shape[0], keys.shape[1]
    out, lse = [], []
    for head in range(heads):
        owner = head // (heads // kv_heads)
        logits = keys[:, owner].double() @ q[head].double() * scale
        if logit_cap:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        lse.append(torch.logsumexp(logits, 0))
        out.append(torch.softmax(logits, 0) @ values[:, owner].double())
    return torch.stack(out), torch.stack(lse)
