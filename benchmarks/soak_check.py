"""After a soak: is anything left in use, and is every answer the answer alone?"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.soak_client import Answer
from benchmarks.soak_jobs import Job
from sgl_lim.programs.endpoint import EndpointError, request_json

IDLE_S = 60.0
"""A server that has nothing to do is idle within so many seconds."""


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the answer alone."""

    answer: Answer
    place: int
    """Of the first token that differs."""
    token: int | None
    alone: int | None
    """None: the answer ended."""
    gap: float | None
    """By how much the log-probability of the token alone exceeds that of the other, alone; None: not among the best."""

    def __str__(self) -> str:
        job = self.answer.job
        gap = "beyond the best" if self.gap is None else f"{self.gap:.2e} below"
        where = f"{job.kind} {job.number}, turn {self.answer.turn}, token {self.place} of {len(self.answer.tokens)}"
        return f"{where}: {self.token}, alone {self.alone} ({gap}; {self.answer.cached} tokens were cached)"


@dataclass(frozen=True)
class Comparison:
    """What became of the finished answers; each is in one of the four."""

    equal: int
    ties: list[Difference]
    """Both tokens are as likely alone, but for rounding."""
    differences: list[Difference]
    aside: int
    """Not compared: what was generated sparsely was prefilled again, densely, so that the keys after it differ; or an
    earlier turn was answered otherwise, which is counted there, so that the prompts differ."""

    @property
    def compared(self) -> int:
        """Answers that were compared."""
        return self.equal + len(self.ties) + len(self.differences)


def compare(
    answers: Sequence[Answer], ask_alone: Callable[[Job], list[Answer]], *, tie: float, dense_up_to: int | None
) -> Comparison:
    """Compare the finished greedy answers with those alone, which are asked once a job.

    Args:
        tie: log-probabilities that differ by no more are a tie.
        dense_up_to: contexts of so many tokens are decoded densely; None: all are.
    """
    greedy = [answer for answer in answers if answer.job.greedy]
    retracted = {answer.job.number for answer in greedy if answer.retracted and len(answer.job.turns) > 1}
    alone = {job.number: ask_alone(job) for job in {answer.job.number: answer.job for answer in greedy}.values()}
    equal, ties, differences, aside = 0, [], [], 0
    for answer in greedy:
        its = alone[answer.job.number][answer.turn]
        difference = first_difference(answer, its)
        # Another session of the same job may have left keys of a retracted turn in the cache.
        again = answer.retracted or (answer.turn and (answer.cached < its.cached or answer.job.number in retracted))
        if answer.earlier != its.earlier or (again and dense_up_to is not None and answer.context > dense_up_to):
            aside += 1
        elif difference is None:
            equal += 1
        elif difference.gap is not None and difference.gap <= tie:
            ties.append(difference)
        else:
            differences.append(difference)
    return Comparison(equal, ties, differences, aside)


def first_difference(answer: Answer, alone: Answer) -> Difference | None:
    """Where an answer first differs from the answer alone; None if nowhere."""
    if answer.tokens == alone.tokens:
        return None
    pairs = zip(answer.tokens, alone.tokens, strict=False)
    shorter = min(len(answer.tokens), len(alone.tokens))
    place = next((place for place, (token, other) in enumerate(pairs) if token != other), shorter)
    token, other = (one.tokens[place] if place < len(one.tokens) else None for one in (answer, alone))
    gap = None
    if token is not None and other is not None and token in alone.top[place]:
        gap = alone.top[place][other] - alone.top[place][token]
    return Difference(answer, place, token, other, gap)


def in_use(url: str) -> tuple[int, int]:
    """Tokens and requests that an idle server still has in use; what its cache may drop does not count.

    It is given some seconds to become idle. SGLang itself then ends a server whose free and used slots or request rows
    do not add up.

    Raises:
        EndpointError: the server does not answer.
    """
    deadline = time.monotonic() + IDLE_S
    while True:
        total: Counter[str] = Counter()
        for load in request_json(f"{url}/v1/loads")["loads"]:
            total.update({name: load[name] for name in ("num_used_tokens", "num_running_reqs", "num_waiting_reqs")})
        requests = total["num_running_reqs"] + total["num_waiting_reqs"]
        if (total["num_used_tokens"], requests) == (0, 0) or time.monotonic() > deadline:
            return total["num_used_tokens"], requests
        time.sleep(0.2)


def still_answers(url: str) -> bool:
    """Whether a server that was idle is there, and its scheduler generates."""
    try:
        request_json(f"{url}/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}})
    except EndpointError:
        return False
    return True
