"""What several servers came to on the same items: rows, as CSV and as a Markdown table."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_lim.programs.compare import majority, rate
from sgl_lim.programs.intervals import paired_difference, paired_ratio
from sgl_lim.programs.run_records import Row
from sgl_lim.programs.run_warnings import warnings_of
from sgl_lim.programs.summary import mean_length, number

COLUMNS = (
    "server",
    "program",
    "problems",
    "answered",
    "samples",
    "metric",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "pass_at_1",
    "pass_at_1_low",
    "pass_at_1_high",
    "majority",
    "majority_low",
    "majority_high",
    "mean_tokens",
    "mean_tokens_error",
    "tokens_per_s",
    "attended_fraction",
    "attended_tokens",
    "pairs",
    "difference",
    "difference_low",
    "difference_high",
    "length_ratio",
    "length_ratio_low",
    "length_ratio_high",
    "settings",
    "description",
    "machine",
)


@dataclass(frozen=True)
class Result:
    """One server's run."""

    name: str
    summary: Mapping[str, Any]
    rows: Mapping[str, Row]  # the last of each problem

    @property
    def answered(self) -> dict[str, Row]:
        """Rows without an error."""
        return {identity: row for identity, row in self.rows.items() if row.error is None}

    def accuracy(self, row: Row) -> float:
        """One problem's part in `summary["accuracy"]`."""
        return row.sample_accuracy if self.summary["accuracy_of"] == "pass@1" else float(row.correct)


def comparison_rows(results: Sequence[Result], machine: str = "") -> list[dict[str, Any]]:
    """One row of `COLUMNS` a server; None where there is no value.

    `difference` is the accuracy's to the first server and `length_ratio` the mean length's, over the `pairs` problems
    that both answered, with their intervals by bootstrap over problems.
    """
    return [_row(result, results[0], machine) for result in results]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows anew."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(results: Sequence[Result], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, and below them what was compared."""
    first = results[0].name
    table = [
        {
            "": row["server"],
            f"{row['metric']} [95%]": rate(*_with_interval(row, "accuracy")),
            **_beside(result, row),
            "mean length": mean_length(result.summary["generation_tokens"]).removeprefix("mean "),
            "tokens/s": number(row["tokens_per_s"], ",.1f"),
            "KV read": number(row["attended_fraction"], ".1%"),
            "attended tokens": number(row["attended_tokens"], ",.0f"),
            f"points over {first}": _points(row) if result is not results[0] else "",
            f"length of {first}'s": _times(row) if result is not results[0] else "",
        }
        for result, row in zip(results, rows, strict=True)
    ]
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    settings = {name: value for name, value in results[0].summary["settings"].items() if name != "attention"}
    shown = ", ".join(f"{name} {_plain(value)}" for name, value in settings.items() if value is not None)
    machine = [f"- {rows[0]['machine']}"] if rows[0]["machine"] else []
    notes = [
        f"- {shown}",
        "- lengths in tokens with their standard error; KV read as a share of dense decode's, half for a token whose "
        "key alone is read; attended tokens a generated token and layer; differences over the same problems, intervals "
        "by bootstrap over problems",
        *(
            f"- {result.name}: {row['answered']} of {row['problems']} answered; {row['description']}"
            for result, row in zip(results, rows, strict=True)
        ),
        *(f"- **{result.name}: {text}**" for result in results for text in warnings_of(result.summary)),
        *machine,
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *notes, ""])


def _row(result: Result, first: Result, machine: str) -> dict[str, Any]:
    summary = result.summary
    voted, lengths = summary["majority"], summary["generation_tokens"]
    own, others = result.answered, first.answered
    pairs = [identity for identity in others if identity in own] if result is not first else []
    difference = paired_difference(
        [first.accuracy(others[identity]) for identity in pairs], [result.accuracy(own[identity]) for identity in pairs]
    )
    longer = paired_ratio(
        [others[identity].mean_tokens for identity in pairs], [own[identity].mean_tokens for identity in pairs]
    )
    return {
        "server": result.name,
        "program": summary["settings"]["program"],
        "problems": summary["problems"],
        "answered": summary["answered"],
        "samples": summary["settings"]["samples"] or 1,
        "metric": summary["accuracy_of"],
        **_columns("accuracy", summary["accuracy"], summary["accuracy_interval"]),
        **_columns("pass_at_1", summary["pass_at_1"]["accuracy"], summary["pass_at_1"]["interval"]),
        **_columns("majority", *((voted["accuracy"], voted["interval"]) if voted else (None, None))),
        "mean_tokens": lengths["mean"],
        "mean_tokens_error": lengths["standard_error"],
        "tokens_per_s": summary["output_tokens_per_second"],
        "attended_fraction": summary["attended_fraction"],
        "attended_tokens": summary["attended_tokens"],
        "pairs": len(pairs) if result is not first else None,
        **_columns("difference", *(difference or (None, None))),
        **_columns("length_ratio", *(longer or (None, None))),
        "settings": json.dumps(summary["settings"]),
        "description": summary["server"],
        "machine": machine,
    }


def _columns(name: str, value: float | None, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _with_interval(row: Mapping[str, Any], name: str) -> tuple[float | None, tuple[float, float] | None]:
    value = row[name]
    return value, None if value is None else (row[f"{name}_low"], row[f"{name}_high"])


def _beside(result: Result, row: Mapping[str, Any]) -> dict[str, str]:
    """The other figure of a run with several samples."""
    if result.summary["majority"] is None:
        return {}
    if row["metric"] == "pass@1":
        return {f"maj@{row['samples']} [95%]": majority(result.summary)}
    return {"pass@1 [95%]": rate(*_with_interval(row, "pass_at_1"))}


def _points(row: Mapping[str, Any]) -> str:
    value, interval = _with_interval(row, "difference")
    if value is None or interval is None:
        return "-"
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _times(row: Mapping[str, Any]) -> str:
    value, interval = _with_interval(row, "length_ratio")
    return "-" if value is None or interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _plain(value: object) -> str:
    return f"({', '.join(f'{k} {_plain(v)}' for k, v in value.items())})" if isinstance(value, Mapping) else repr(value)
