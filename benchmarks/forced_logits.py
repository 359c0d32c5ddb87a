"""What a server says about the next tokens while it decodes tokens that it is given: teacher forcing over HTTP.

`logit_bias` raises one token above all others, and greedy decoding then generates it at every step. Decode step i of a
request attends to the prompt and i forced tokens, the same on every server, so no early difference can grow into other
text. SGLang adds the bias before it computes log-probabilities. That moves all tokens but the forced one by the same
amount, so logits are compared without it, and up to a constant. Of each step a fixed set of tokens is watched.

A prompt is sent once for each forced token: these requests share it in the radix cache.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.closed_loop import random_prompts
from benchmarks.decode_throughput import greedy, post
from benchmarks.targets import flush_cache

Logits = npt.NDArray[np.float64]  # (request, decode step, watched token), each step's mean is 0
FORKS = 2
WATCHED = 128
BIAS = 100.0  # above any logit's distance from the largest one; float32 still resolves 8e-6 beside it


class NotForced(RuntimeError):
    """A server generated another token than the one that the bias raised."""


@dataclass(frozen=True)
class Forced:
    """The requests: every prompt with every forced token, a prompt's requests beside one another."""

    prompts: Sequence[Sequence[int]]
    forced: Sequence[int]
    watched: Sequence[int]
    steps: int  # decode steps of each request

    @classmethod
    def draw(cls, count: int, longest: int, steps: int, token_range: tuple[int, int], seed: int) -> "Forced":
        """`count` random prompts, the first of `longest` tokens and each half as long as the one before.

        A wrong token weighs the more, the fewer there are, and rows of a batch differ in length as under load.
        """
        prompts = random_prompts(count, longest, token_range, seed)
        tokens = random.Random(seed).sample(range(*token_range), min(FORKS + WATCHED, len(range(*token_range))))
        halves = [prompt[: max(1, longest >> place)] for place, prompt in enumerate(prompts)]
        return cls(halves, tokens[:FORKS], tokens[FORKS:], steps)

    @property
    def rows(self) -> list[tuple[Sequence[int], int]]:
        """Prompt and forced token of each request."""
        return [(prompt, token) for prompt in self.prompts for token in self.forced]

    @property
    def longest(self) -> int:
        """Tokens in the longest request when it ends."""
        return max(map(len, self.prompts)) + self.steps + 1

    def decoded(self, url: str, *, together: bool) -> tuple[Logits, float]:
        """Logits of the decode steps from an empty cache, all requests at once or one after the other.

        Returns:
            The logits, and the distance of neighbouring float32 numbers where the log-probabilities lie.

        Raises:
            EndpointError: the server did not answer.
            NotForced: it generated other tokens than the forced ones.
        """
        flush_cache(url)
        rows = self.rows
        batches = [rows] if together else [[row] for row in rows]
        # The first token comes from the prefill, which is dense on every server.
        found = np.array([steps[1:] for batch in batches for steps in self._generated(url, batch)])
        return centred(found), float(np.spacing(np.float32(np.abs(found).max())))

    def _generated(self, url: str, batch: Sequence[tuple[Sequence[int], int]]) -> list[list[list[float]]]:
        """Log-probabilities of the watched tokens after each of a batch's prompts and after each forced token."""
        sampling = [greedy(self.steps + 1, ignore_eos=True, logit_bias={str(token): BIAS}) for _, token in batch]
        answers = self._ask(url, [list(prompt) for prompt, _ in batch], sampling)
        for answer, (_, token) in zip(answers, batch, strict=True):
            if list(answer["output_ids"]) != [token] * (self.steps + 1):
                raise NotForced(
                    f"expected token {token} {self.steps + 1} times, got {answer['output_ids']}; the server does not "
                    "follow logit_bias, without which its logits cannot be compared"
                )
        return [_log_probabilities(answer["meta_info"]["output_token_ids_logprobs"]) for answer in answers]

    def prefilled(self, url: str) -> Logits:
        """The logits that `decoded` asks for, from one prefill of each request's prompt and forced tokens.

        Raises:
            EndpointError: the server did not answer.
        """
        flush_cache(url)
        found = []
        for prompt, token in self.rows:
            # One token more: what is said of it is what follows the last step.
            tokens = [*prompt, *[token] * (self.steps + 1)]
            answer = self._ask(url, [tokens], [greedy(1)], logprob_start_len=len(prompt))[0]
            # The first forced token's entry is blank; the others say what was expected in the tokens' place.
            found.append(_log_probabilities(answer["meta_info"]["input_token_ids_logprobs"][1:]))
        return centred(np.array(found))

    def _ask(self, url: str, prompts: list[list[int]], sampling: list[dict[str, Any]], **more: Any) -> list[Any]:
        watched = list(self.watched)
        more |= {"return_logprob": True, "token_ids_logprob": watched}
        answers: list[Any] = post(url, input_ids=prompts, sampling_params=sampling, **more)
        return answers


def _log_probabilities(steps: Sequence[Sequence[Sequence[Any]]]) -> list[list[float]]:
    """Of each step's entries (log-probability, token, text); a server sends null for NaN."""
    return [[float("nan") if value is None else float(value) for value, *_ in step] for step in steps]


def centred(log_probabilities: npt.NDArray[np.float64]) -> Logits:
    """Without each step's mean, which holds what the bias and the softmax added to all watched tokens."""
    return log_probabilities - log_probabilities.mean(axis=-1, keepdims=True)


def distances(found: Logits, expected: Logits) -> npt.NDArray[np.float64]:
    """‖found − expected‖ / ‖expected‖ of each request and step; NaN where something is not finite."""
    distance: npt.NDArray[np.float64] = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return distance
