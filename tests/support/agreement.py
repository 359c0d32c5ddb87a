"""When two servers' answers agree, with bounds taken from the data."""

from collections.abc import Sequence

import torch

from support.float64_qwen3 import ChooseSet, Float64Qwen3
from support.server import Answer


def errors(
    model: Float64Qwen3, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], choose: ChooseSet | None = None
) -> tuple[float, float]:
    """Largest error of the answers' log-probabilities (best five a token) against float64, and their magnitude.

    `choose` gives the sets of sparse layers; None is dense decode. The exact values follow each answer's own tokens,
    so answers that part at a near-tie stay comparable.
    """
    worst = magnitude = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        exact = model.logprobs(prompt, answer.tokens, choose)
        for row, top in zip(exact, answer.top, strict=True):
            served = torch.tensor(list(top.values()), dtype=torch.float64)
            worst = max(worst, float((served - row[list(top)]).abs().max()))
            magnitude = max(magnitude, float(served.abs().max()))
    return worst, magnitude


def largest_difference(first: Sequence[Answer], second: Sequence[Answer]) -> float:
    """Largest difference between log-probabilities of two runs that wrote the same tokens."""
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=True)]
    return max(abs(x - y) for x, y in pairs)


def same_tokens(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    """Whether two runs wrote the same."""
    return [a.tokens for a in first] == [a.tokens for a in second]
