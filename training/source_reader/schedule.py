"""What a run does at which share of its time: learning rate, row length, closing."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Shares are of a run's training time. Rows are `short` tokens until `long_from`, then `long`."""

    short: int
    long: int
    long_from: float = 0.45
    closing_from: float = 0.6
    closing: bool = True
    warmup: float = 0.015
    decay_from: float = 0.4
    last_factor: float = 0.02

    def length(self, done: float) -> int:
        """Tokens of a row."""
        return self.short if done < self.long_from else self.long

    def closes(self, done: float) -> bool:
        """Whether random layers are closed; only in long rows."""
        return self.closing and done >= max(self.closing_from, self.long_from)

    def factor(self, done: float) -> float:
        """Of the learning rate: linear warm-up, constant, linear fall."""
        falling = (1.0 - done) / (1.0 - self.decay_from)
        return min(1.0, (done + 1e-3) / self.warmup, max(self.last_factor, falling))


class Clock:
    """Training time, counted over interruptions."""

    def __init__(self, budget: float, used: float = 0.0) -> None:
        self.budget = budget
        self._begin = time.monotonic() - used

    @property
    def used(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._begin

    @property
    def done(self) -> float:
        """Share of the budget that is used."""
        return self.used / self.budget
