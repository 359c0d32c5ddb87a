"""The logits of a made-up model over HTTP: what an endpoint answers whose tokens are forced by `logit_bias`."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOCABULARY = 512
Context = Sequence[int]
_OF_TOKEN = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))


@dataclass
class ForcedModel:
    """Logits are the mean over the context of a random vector of each token, times the root of its length.

    Attributes:
        noise: standard deviation of what every answer differs by, the logits' own being 1.
        read: the context that decode step `step` (1 is the first) of request `row` of a batch attends to.
        obeys: whether `logit_bias` is followed.
        attention: how much of the logits depends on the context.
    """

    noise: float = 0.0
    read: Callable[[int, int, list[int]], list[int]] = lambda row, step, context: context
    obeys: bool = True
    attention: float = 1.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def answers(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to a batch of prompts."""
        found = []
        for row, prompt in enumerate(request["input_ids"]):
            sampling = request["sampling_params"]
            sampling = sampling[row] if isinstance(sampling, list) else sampling
            bias = {int(token): value for token, value in sampling.get("logit_bias", {}).items()}
            forced = next(iter(bias), 0) if self.obeys else 0
            contexts = [[*prompt, *[forced] * step] for step in range(sampling["max_new_tokens"])]
            read = [self.read(row, step, context) if step else context for step, context in enumerate(contexts)]
            watched, start = request["token_ids_logprob"], request.get("logprob_start_len", len(prompt))
            said: list[Any] = [self.said(prompt[:end], watched, {}) for end in range(start + 1, len(prompt))]
            meta = {
                "output_token_ids_logprobs": [self.said(context, watched, bias) for context in read],
                "input_token_ids_logprobs": [None, *said] if start < len(prompt) else [],
            }
            found.append({"output_ids": [forced] * len(contexts), "meta_info": meta})
        return found

    def said(self, context: Context, watched: Sequence[int], bias: dict[int, float]) -> list[list[Any]]:
        """Log-probabilities of the watched tokens as the server sends them."""
        heard = _OF_TOKEN[list(context)].sum(0) / len(context) ** 0.5
        logits = self.attention * heard + (1 - self.attention) * _OF_TOKEN[context[-1]]
        logits = logits + np.random.default_rng(self.draw.getrandbits(32)).standard_normal(VOCABULARY) * self.noise
        for token, value in bias.items():
            logits[token] += value
        logs = (logits - np.logaddexp.reduce(logits)).astype(np.float32)
        return [[float(logs[token]), token, None] for token in watched]
