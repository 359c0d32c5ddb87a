"""May a server be timed beside the baseline? Only if it decodes the same tokens to the same logits.

All servers decode the same forced tokens over the same prompts, inside the token budget, where sparse decode attends to
everything and must be dense decode up to rounding (`forced_logits`). Every request and every step counts: the largest
relative distance from the baseline's logits is the server's error. How large it may be is measured on the baseline:

- Its noise is how far it is from itself when the same tokens are computed in another order: one request at a time
  instead of all at once, and in one prefill instead of step by step. An error up to twice the noise is rounding. (To
  that comes what float32 cannot resolve in the log-probabilities sent; it matters where the baseline has no noise.)
- Its control is how far it is from itself over another prompt, the forced tokens being the same: what a server would
  show whose request reads another one's keys. Where the control is within the limit, the check could not fail, and it
  says so instead of passing. Weights of `--load-format dummy` are such a case: their attention hardly acts.

So nothing passes because texts happen to agree, and nothing fails because a near tie falls the other way. What sparse
decode selects beyond the budget is not checked here: there it differs from dense decode by design. Sets and attention
are compared with their references in tests/kernels, and trained models' answers are graded (docs/accuracy.md).
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from benchmarks.decode_throughput import solve_chains
from benchmarks.forced_logits import Forced, Logits, NotForced, distances
from benchmarks.load_spec import positive
from sgl_lim.programs.server_stats import parse_server_info

NOISE_FACTOR = 2.0
COLUMNS = ("logits_error", "logits_limit", "logits_control")


class CheckFailed(RuntimeError):
    """A server's answers are not the baseline's, or could not be compared."""


@dataclass(frozen=True)
class Baseline:
    """What the first server said, and what follows for the others."""

    together: Logits
    alone: Logits
    noise: float
    limit: float
    control: float

    @classmethod
    def measure(cls, url: str, asked: Forced) -> "Baseline":
        """Ask the first server in three ways.

        Raises:
            CheckFailed: its answers are no measure for others.
        """
        together, band = asked.decoded(url, together=True)
        alone, _ = asked.decoded(url, together=False)
        noise = float(max(distances(other, together).max() for other in (alone, asked.prefilled(url))))
        size = float(np.linalg.norm(together, axis=-1).min()) / together.shape[-1] ** 0.5
        found = cls(together, alone, noise, NOISE_FACTOR * noise + band / size, control(together, asked))
        # Not `<`: a NaN must fail.
        if not found.limit < found.control:
            raise CheckFailed(
                f"the check cannot tell right from wrong here: over another prompt the logits differ by "
                f"{found.control:.2g}, and {found.limit:.2g} must be allowed for rounding. Do the weights let "
                "attention act? Those of --load-format dummy do not; those of benchmarks.random_checkpoint do"
            )
        return found

    def error(self, url: str, asked: Forced) -> float:
        """The largest distance of a server's logits from these, whether it decodes requests together or alone."""
        together, alone = asked.decoded(url, together=True)[0], asked.decoded(url, together=False)[0]
        return float(np.max([distances(together, self.together), distances(alone, self.alone)]))


def control(logits: Logits, asked: Forced) -> float:
    """Over all pairs of prompts, the least of the distances that the worst step between them shows."""
    by_prompt = logits.reshape(len(asked.prompts), len(asked.forced), *logits.shape[1:])
    pairs = [distances(found, expected).max(axis=-1) for found, expected in permutations(by_prompt, 2)]
    return float(np.min(pairs))


def prompts(text: str) -> int:
    """How many prompts to compare, from the command line: one alone has no other prompt as its control."""
    if not text.isdecimal() or int(text) == 1:
        raise argparse.ArgumentTypeError(f"expected 0, or 2 or more, because prompts control one another; got {text!r}")
    return int(text)


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `chosen_check` reads."""
    parser.add_argument(
        "--check", type=prompts, default=4, metavar="PROMPTS", help="prompts whose logits are compared (0: none)"
    )
    parser.add_argument(
        "--check-len",
        type=positive,
        nargs=2,
        default=(1000, 16),
        metavar=("IN", "STEPS"),
        help="tokens of the longest of them, the others being a half, a quarter and so on, and decode steps of each",
    )


def chosen_check(args: argparse.Namespace, token_range: tuple[int, int]) -> Forced | None:
    """What the servers of a parsed command line are asked; None for `--check 0`."""
    longest, steps = args.check_len
    return Forced.draw(args.check, longest, steps, token_range, args.seed + 1) if args.check else None


@dataclass
class AnswerCheck:
    """What to ask, and what the baseline, the first server asked, answered."""

    asked: Forced | None
    chains: int = 0
    facts: int = 0
    steps: int = 0
    _baseline: Baseline | None = None
    _answers: list[str | None] = field(default_factory=list)

    def logits(self, url: str, info: Mapping[str, Any]) -> dict[str, str]:
        """The columns `COLUMNS`, blank if nothing is asked; `info` is the server's `/server_info`.

        The first server's error is its noise.

        Raises:
            CheckFailed: the logits are not the baseline's, or cannot be compared.
        """
        if self.asked is None:
            return dict.fromkeys(COLUMNS, "")
        budget = parse_server_info(info).attention.get("budget")
        if budget is not None and self.asked.longest > budget:
            raise CheckFailed(
                f"--check-len sums to {self.asked.longest} tokens with the first one, but beyond {budget} decode is "
                "sparse; lower it"
            )
        try:
            return self._compared(url, self.asked)
        except NotForced as error:
            raise CheckFailed(str(error)) from error

    def _compared(self, url: str, asked: Forced) -> dict[str, str]:
        if self._baseline is None:
            self._baseline = Baseline.measure(url, asked)
            error = self._baseline.noise
        else:
            error = self._baseline.error(url, asked)
        # Not `>`: a NaN must fail.
        if not error <= self._baseline.limit:
            raise CheckFailed(
                f"its logits are {error:.2g} from the baseline's, which is {self._baseline.noise:.2g} from itself; "
                f"{self._baseline.limit:.2g} is allowed; not timed"
            )
        figures = error, self._baseline.limit, self._baseline.control
        return dict(zip(COLUMNS, (f"{figure:.2g}" for figure in figures), strict=True))

    def same_answers(self, url: str) -> str:
        """Chain problems answered as by the baseline, of all; blank without problems."""
        if not self.chains:
            return ""
        answers = solve_chains(url, self.chains, self.facts, self.steps)
        self._answers = self._answers or answers
        return f"{sum(a == b for a, b in zip(answers, self._answers, strict=True))}/{self.chains}"
