"""Are a server's greedy answers the baseline's? The first server asked is the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.closed_loop import random_prompts
from benchmarks.decode_throughput import greedy, post, solve_chains
from sgl_lim.programs.server_stats import parse_server_info


class CheckFailed(RuntimeError):
    """A server's answers are not the baseline's, or could not be compared."""


@dataclass
class AnswerCheck:
    """What to ask, and what the baseline answered.

    Inside the token budget sparse decode is dense up to rounding, but with random weights rounding alone can change a
    token and with it all later ones: hence a fraction of leading tokens, and a threshold.
    """

    prompts: int
    length: int  # tokens
    new_tokens: int
    token_range: tuple[int, int]
    seed: int
    threshold: float  # least fraction of leading tokens that must agree
    chains: int
    facts: int
    steps: int
    _tokens: list[list[int]] = field(default_factory=list)
    _answers: list[str | None] = field(default_factory=list)

    def same_tokens(self, url: str, info: Mapping[str, Any]) -> float | None:
        """Leading tokens that agree, of all; `info` is the server's `/server_info`. None without prompts.

        Raises:
            CheckFailed: fewer than the threshold, or the prompts leave the token budget.
        """
        if not self.prompts:
            return None
        total, budget = self.length + self.new_tokens, parse_server_info(info).attention.get("budget")
        if budget is not None and total > budget:
            raise CheckFailed(f"--check-len sums to {total} tokens, but from {budget} on decode is sparse; lower it")
        prompts = random_prompts(self.prompts, self.length, self.token_range, self.seed)
        answers = post(url, input_ids=prompts, sampling_params=greedy(self.new_tokens, ignore_eos=True))
        tokens = [list(answer["output_ids"]) for answer in answers]
        self._tokens = self._tokens or tokens
        same = leading_agreement(tokens, self._tokens)
        if same < self.threshold:
            raise CheckFailed(
                f"{same:.3f} of the tokens agree with the baseline's, less than --check-threshold {self.threshold}; "
                "not timed"
            )
        return same

    def same_answers(self, url: str) -> str:
        """Chain problems answered as by the baseline, of all; blank without problems."""
        if not self.chains:
            return ""
        answers = solve_chains(url, self.chains, self.facts, self.steps)
        self._answers = self._answers or answers
        return f"{sum(a == b for a, b in zip(answers, self._answers, strict=True))}/{self.chains}"


def leading_agreement(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Tokens before each answer's first difference, of the reference's tokens."""
    same = 0
    for answer, expected in zip(answers, reference, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b)
        same += next(differ, min(len(answer), len(expected)))
    return same / sum(len(expected) for expected in reference)
