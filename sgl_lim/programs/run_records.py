"""The output file: one JSON object a line and problem, safe against kills, never mixing two runs' settings.

An invocation that ends, interrupted or not, adds a line with its speed and what the server attended.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = "sgl-lim-programs/1"
_LINE_START = json.dumps({"format": FORMAT})[:-1].encode()  # every line begins with these bytes
_MEASUREMENT_START = _LINE_START + b', "measurement":'


class RecordError(RuntimeError):
    """The output file cannot be used for this run; the message says why, and the way out."""


@dataclass(frozen=True)
class Generation:
    """One generation as the server returned it. Token counts are the server's own."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    finish_reason: str  # "stop" or "length"
    other_tokens: int = 0  # generated on the way on branches that this text is not of
    tokens_dense: int | None = None  # KV tokens that a layer of a dense decode reads for all that was generated
    thinking_tokens: int | None = None  # budget forcing only, as the next two; with the ends that were dropped
    waits: int | None = None  # how often an end was dropped
    forced: bool | None = None  # whether the thinking reached its cap
    thinking_opened: bool = False  # by the prompt, so that no tag of it stands in the text


@dataclass(frozen=True)
class Sample:
    """A generation and its grade; the chain fields and budget forcing's are None elsewhere."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str
    answer: str | None
    correct: bool
    whole_chain: bool | None = None
    words_matching: int | None = None
    words_total: int | None = None
    other_tokens: int = 0
    tokens_dense: int | None = None
    thinking_tokens: int | None = None
    waits: int | None = None
    forced: bool | None = None
    thinking_opened: bool = False
    by_spelling: bool = False  # the answer was too costly to compute, and equals nothing but its own spelling

    @property
    def context_tokens(self) -> int | None:
        """`tokens_dense`, also of samples that were recorded without it; None if it cannot be known."""
        if self.tokens_dense is None and not self.other_tokens:
            return dense_reads(self.prompt_tokens, self.completion_tokens)
        return self.tokens_dense


def dense_reads(prompt_tokens: int, completion_tokens: int) -> int:
    """KV tokens that a layer of a dense decode reads for one request: each token follows all those before it."""
    return completion_tokens * prompt_tokens + completion_tokens * (completion_tokens - 1) // 2


@dataclass(frozen=True)
class Row:
    """What became of one problem. With an `error` there are no samples, and a later run asks it again."""

    id: str
    expected: str
    settings: Mapping[str, Any]
    seconds: float  # from the first request to the last answer
    error: str | None = None
    answer: str | None = None  # the majority's with several samples
    correct: bool = False
    samples: tuple[Sample, ...] = field(default=())

    @property
    def output_tokens(self) -> int:
        """All that was generated for it."""
        return sum(sample.completion_tokens + sample.other_tokens for sample in self.samples)

    @property
    def sample_accuracy(self) -> float:
        """The share of right samples; of a row without an error."""
        return sum(sample.correct for sample in self.samples) / len(self.samples)

    @property
    def mean_tokens(self) -> float:
        """Mean length of its generations; of a row without an error."""
        return sum(sample.completion_tokens for sample in self.samples) / len(self.samples)

    def to_json(self) -> str:
        """One line without its newline, ASCII only: a model's text may hold what UTF-8 cannot."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(line: bytes) -> "Row":
        """Raises ValueError if the line is not a row of this format."""
        try:
            fields = json.loads(line)
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            fields["samples"] = tuple(Sample(**sample) for sample in fields["samples"])
            return Row(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a row: {error}") from error


@dataclass(frozen=True)
class Measurement:
    """What one invocation measured beside its rows, so that a resumed run has the figures of all its parts."""

    items: int
    output_tokens: int
    seconds: float
    attended: float | None  # the share of a dense decode's KV tokens; None if it is not known
    note: str  # on `attended`
    counters: Mapping[str, int] | None  # what the server counted meanwhile, if it decodes sparsely

    def to_json(self) -> str:
        """One line without its newline."""
        return json.dumps({"format": FORMAT, "measurement": asdict(self)})

    @staticmethod
    def from_json(line: bytes) -> "Measurement | None":
        """None if the line is something else; raises ValueError if it is broken."""
        if not line.startswith(_MEASUREMENT_START):
            return None
        try:
            return Measurement(**json.loads(line)["measurement"])
        except TypeError as error:
            raise ValueError(f"not a measurement: {error}") from error


class RecordFile:
    """Rows and measurements in a file, open for appending and locked; a context manager.

    Each line is one unbuffered write, so a killed process leaves whole lines and at most one torn last one, which the
    next opening removes. Opening raises `RecordError` if

    - another process has the file open,
    - it holds something else than rows, or
    - a row's settings differ from `settings`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.repaired = False  # whether a torn last line was removed
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise RecordError(f"{path}: cannot be opened for writing ({error.strerror or error})") from error
        try:
            self._lock()
            self.measurements: list[Measurement] = []
            self.rows: dict[str, Row] = {row.id: row for row in self._read()}  # the last row of each id
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def finished(self, problem_id: str) -> bool:
        """Whether the problem has a row without an error."""
        row = self.rows.get(problem_id)
        return row is not None and row.error is None

    def append(self, row: Row) -> None:
        """Write one row.

        Raises:
            RecordError: the disk did not take it; what is torn is removed at the next opening.
        """
        self._write(row.to_json())
        self.rows[row.id] = row

    def measured(self, measurement: Measurement) -> None:
        """Write what an invocation measured; raises as `append`."""
        self._write(measurement.to_json())
        self.measurements.append(measurement)

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        line = text.encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        if written != len(line):
            raise RecordError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(
                f"{self.path}: another run is writing it; wait for that run or name another --output"
            ) from error
        except OSError:
            pass  # a file system without locks: the check is a courtesy

    def _read(self) -> list[Row]:
        self._file.seek(0)
        content = self._file.read()
        *lines, tail = content.split(b"\n")
        torn = _is_torn(tail)
        if tail and not torn:
            lines.append(tail)
        rows = []
        for number, line in enumerate(lines, start=1):
            entry = self._parse(line, number)
            if isinstance(entry, Measurement):
                self.measurements.append(entry)
            else:
                rows.append(entry)
        if torn:
            self._file.truncate(len(content) - len(tail))
        elif tail:
            self._file.write(b"\n")
        self.repaired = torn
        return rows

    def _parse(self, line: bytes, number: int) -> Row | Measurement:
        try:
            if measurement := Measurement.from_json(line):
                return measurement
            row = Row.from_json(line)
        except ValueError as error:
            raise RecordError(
                f"{self.path}:{number}: not a result of sgl_lim.programs ({error}); nothing was changed: "
                "remove the line, or name another --output"
            ) from error
        differences = describe_differences(row.settings, self.settings)
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise RecordError(
                f"{self.path}:{number}: holds results of a run with other settings, and results of different runs do "
                f"not go into one file:\n{listed}\nname another --output, or repeat the settings of the file"
            )
        return row


def read_rows(path: Path) -> list[Row]:
    """All rows of a file that nobody writes any more, in order; a problem that was asked again has several.

    Raises:
        ValueError: a line is neither a row nor a measurement.
        OSError: the file cannot be read.
    """
    return [Row.from_json(line) for line in path.read_bytes().splitlines() if Measurement.from_json(line) is None]


def _is_torn(tail: bytes) -> bool:
    """Whether the bytes after the last newline are the beginning of a line of ours, and not a whole one."""
    if not tail or not (tail.startswith(_LINE_START) or _LINE_START.startswith(tail)):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each leaf of two nested settings that differs, as `name: file has X, this run has Y`."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += describe_differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: file has {json.dumps(before)}, this run has {json.dumps(now)}")
    return lines
