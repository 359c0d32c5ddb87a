"""Stopping by SIGINT and SIGTERM: what a command does about them while it runs."""

import signal
import threading
from types import FrameType
from typing import Any


class SignalHandlers:
    """Context in which `handle` is called for SIGINT and SIGTERM; afterwards they act as they did before."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Any:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def handle(self, number: int) -> None:
        """Called for each signal, once `signal_number` is set."""
        raise NotImplementedError

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        self.handle(number)


class StopOnSignal(SignalHandlers):
    """Turns the first SIGINT or SIGTERM into `event`; a second one acts as it did before.

    The main thread may look at `event` and must neither wait for it nor set it: a handler runs in that thread, and
    would wait for a lock that it holds itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def handle(self, number: int) -> None:
        """Stop, and leave the next one alone."""
        self.event.set()
        self.__exit__()
