"""A tiny model, the exact probabilities of its answers by SGLang's sampling parameters, and how well draws fit them.

The oracle works token by token in float64, from the definition of each parameter. It shares nothing with the code of
the lossless mode.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

VOCAB = 6
LENGTH = 3
"""Tokens of an answer."""
FIRST = 5
"""The token that the prefill answered."""

Logits = Callable[[Sequence[int]], Sequence[float]]
"""A model's logits of the next token by the answered tokens."""


def table_of(seed: int) -> Tensor:
    """A model: logits [VOCAB, VOCAB] of the next token by the token before it."""
    return 2.0 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


TARGET, DRAFT = table_of(1), table_of(1) + 0.7 * table_of(2)


def by_table(answered: Sequence[int]) -> list[float]:
    """The target's logits."""
    return TARGET[answered[-1]].tolist()


@dataclass(frozen=True)
class Parameters:
    """SGLang's sampling parameters of one request."""

    temperature: float = 1.0
    top_k: int = 1 << 30
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    forbidden: Callable[[Sequence[int]], set[int]] | None = None
    """A grammar: what may not follow the answered tokens."""


def adjusted(parameters: Parameters, answered: Sequence[int], model: Logits) -> list[float]:
    """Logits of the next token after these answers, before temperature."""
    logits = list(model(answered))
    for token in range(VOCAB):
        times = answered.count(token)
        logits[token] -= parameters.frequency_penalty * times + parameters.presence_penalty * (times > 0)
        if len(answered) < parameters.min_new_tokens and token in parameters.stop_token_ids:
            logits[token] = -math.inf
        if times:
            scale = parameters.repetition_penalty
            logits[token] = logits[token] * scale if logits[token] < 0 else logits[token] / scale
        if parameters.forbidden is not None and token in parameters.forbidden(answered):
            logits[token] = -math.inf
        logits[token] += parameters.logit_bias.get(token, 0.0)
    return logits


def exact_step(parameters: Parameters, answered: Sequence[int], model: Logits, in_turn: bool) -> list[float]:
    """Probabilities of the next token after these answers."""
    logits = adjusted(parameters, answered, model)
    if parameters.temperature == 0:
        return [float(token == logits.index(max(logits))) for token in range(VOCAB)]
    weights = [math.exp(x / parameters.temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    return _filtered(parameters, probs, in_turn)


def _filtered(parameters: Parameters, probs: list[float], in_turn: bool) -> list[float]:
    ranked = sorted(range(VOCAB), key=lambda token: -probs[token])
    mass = sum(probs[token] for token in ranked[: parameters.top_k]) if in_turn else 1.0
    kept, before = {}, 0.0
    for rank, token in enumerate(ranked):
        likely = probs[token] >= parameters.min_p * probs[ranked[0]]
        if rank < parameters.top_k and before <= parameters.top_p * mass and likely:
            kept[token] = probs[token]
        before += probs[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(VOCAB)]


def exact_answers(
    parameters: Parameters,
    in_turn: bool = False,
    model: Logits = by_table,
    before: tuple[int, ...] = (FIRST,),
    length: int = LENGTH,
) -> Tensor:
    """Probability of each sequence of `length` tokens, in their order, as an answer after the tokens `before`; float64.

    Args:
        in_turn: whether top-p counts what top-k left.
    """
    steps: dict[tuple[int, ...], list[float]] = {}
    probs = []
    for sequence in itertools.product(range(VOCAB), repeat=length):
        prob = 1.0
        for place, token in enumerate(sequence):
            answered = (*before, *sequence[:place])
            if prob and answered not in steps:
                steps[answered] = exact_step(parameters, answered, model, in_turn)
            prob *= prob and steps[answered][token]
        probs.append(prob)
    return torch.tensor(probs, dtype=torch.float64)


def fit(answers: Tensor, exact: Tensor) -> float:
    """Probability that answers int64 [N, length], drawn from `exact`, are as far from it as these, by chi-square.

    Sequences that are expected less than five times are taken together. An impossible one gives 0.
    """
    powers = [VOCAB**power for power in reversed(range(answers.shape[1]))]
    counts = torch.bincount((answers * torch.tensor(powers)).sum(1), minlength=len(exact)).double()
    if counts[exact == 0].any():
        return 0.0
    expected = exact * len(answers)
    common = expected >= 5
    rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
    counts, expected = counts[common], expected[common]
    if rest[1] >= 5:
        counts, expected = torch.cat([counts, rest[:1]]), torch.cat([expected, rest[1:]])
    distance = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2).double()
    return 1.0 if freedom == 0 else float(torch.special.gammaincc(freedom, distance / 2))
