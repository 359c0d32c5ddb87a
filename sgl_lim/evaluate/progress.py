"""Progress on standard error with the time that is left: a bar on a terminal, else a line now and then."""

import sys
import time

_LINE_EVERY_SECONDS = 10.0
_FIRST_LINE_SECONDS = 2.0


class Progress:
    """Counts decoded tokens; `close` when there are no more."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._what = total, 0, ""
        self._began = time.monotonic()
        # How long it takes is told early.
        self._last_line = self._began - _LINE_EVERY_SECONDS + _FIRST_LINE_SECONDS
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="token", file=sys.stderr, dynamic_ncols=True)

    def begin(self, what: str) -> None:
        """Name what comes next."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def add(self, tokens: int) -> None:
        """Tokens that were decoded."""
        self._done += tokens
        if self._bar is not None:
            self._bar.update(tokens)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self._what}: {self._done / self._total:.0%} of all is done, about {self._left()} left")

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()

    def _left(self) -> str:
        seconds = (time.monotonic() - self._began) * (self._total - self._done) / self._done
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
