"""Progress on standard error: a bar on a terminal, else a line now and then."""

import sys
import time

from sgl_lim.programs.run_records import Row

_LINE_EVERY_SECONDS = 10.0
_ERRORS_SHOWN = 3


class Progress:
    """Call it with each row of this invocation; `close` when there are no more. Counts include `done` earlier rows."""

    def __init__(self, total: int, *, done: int, correct: int) -> None:
        self._total, self._done, self._answered, self._correct = total, done, done, correct
        self._errors = self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="problem", file=sys.stderr, dynamic_ncols=True)

    def __call__(self, row: Row) -> None:
        self._done += 1
        self._tokens += row.output_tokens
        if row.error is None:
            self._answered += 1
            self._correct += row.correct
        else:
            self._show_error(row)
        if self._bar is not None:
            self._bar.set_postfix_str(self._state(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS or self._done == self._total:
            self._last_line = time.monotonic()
            self._write(f"{self._done}/{self._total} problems, {self._state()}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _state(self) -> str:
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        errors = f", {self._errors} errors" if self._errors else ""
        return f"{self._correct}/{self._answered} correct{errors}, {speed:,.0f} tokens/s"

    def _show_error(self, row: Row) -> None:
        self._errors += 1
        if self._errors <= _ERRORS_SHOWN:
            last = "; further errors are in the output only" if self._errors == _ERRORS_SHOWN else ""
            self._write(f"problem {row.id}: {row.error}{last}")

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
