"""What is written: rows of the CSV, the table at the end, and the sentence that says what to set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_lim.evaluate.choices import FULL, ROUNDING, Choice
from sgl_lim.evaluate.items import DEPTHS
from sgl_lim.evaluate.measure import Row, Share
from sgl_lim.evaluate.output import RowsFile, aligned

FIELDS = (
    "suite", "task", "method", "budget", "selection_layers", "selection_attends", "items", "tokens",
    "agreement", "agreement_low", "agreement_high", "perplexity", "overlap",
    "whole", "whole_low", "whole_high", "right", *(f"whole_at_{depth}" for depth in DEPTHS),
    "attended", "attended_tokens", "attended_fraction", "seconds",
)  # fmt: skip
WHERE = ("model", "context", "seed", "dtype", "device", "torch", "transformers")
ALIKE = 0.01
"""Choices whose agreement differs by less are told apart by what they read."""
_TELLS = 0.5
"""A suite of which full attention itself has less right says nothing about a choice."""


def csv_row(row: Row) -> dict[str, str]:
    """Columns by name."""
    layers = "-".join(map(str, row.choice.layers))
    found = {"suite": row.suite, "task": row.task, "method": row.choice.spec, "selection_layers": layers}
    found["selection_attends"] = row.choice.method.selection_attends if layers else ""
    found |= {"budget": str(row.choice.budget or ""), "items": str(row.items), "tokens": str(row.tokens)}
    for name, share in (("agreement", row.agreement), ("whole", row.whole)):
        found |= {name: f"{share.value:.4f}", f"{name}_low": f"{share.low:.4f}", f"{name}_high": f"{share.high:.4f}"}
    for name in ("perplexity", "overlap", "right", "attended", "attended_fraction"):
        found[name] = f"{getattr(row, name):.4f}"
    found |= {"attended_tokens": f"{row.attended_tokens:.1f}", "seconds": f"{row.seconds:.1f}"}
    return found | {f"whole_at_{depth}": f"{share:.4f}" for depth, share in row.by_depth.items()}


def csv_file(path: Path, where: Mapping[str, str]) -> RowsFile:
    """The CSV file of an evaluation, which takes `csv_row`s; the columns of `where` are equal in every row."""
    return RowsFile(path, (*FIELDS, *WHERE), where)


def table(rows: Sequence[Row]) -> str:
    """A line a choice: what it reads, agreement and perplexity of texts, and what is right of the others."""
    suites = list(dict.fromkeys(row.suite for row in rows))
    lines = [["method", "layers", "budget", "read", *suites]]
    for choice, of_choice in by_choice(rows).items():
        read = sum(row.attended_fraction for row in of_choice.values()) / len(of_choice)
        cells = [_cell(of_choice[suite]) for suite in suites]
        layers = ",".join(map(str, choice.layers)) or "-"
        if choice.layers and choice.method.selection_attends == "set":
            layers += " (set)"
        lines.append([choice.spec, layers, str(choice.budget or "-"), f"{read:.0%}", *cells])
    return aligned(lines)


def _cell(row: Row) -> str:
    if row.task == "text":
        return f"{100 * row.agreement.value:.1f}% {_interval(row.agreement)} ppl {row.perplexity:.2f}"
    return f"{100 * row.whole.value:.0f}% {_interval(row.whole)}"


def _interval(share: Share) -> str:
    return f"[{100 * share.low:.0f}, {100 * share.high:.0f}]"


def by_choice(rows: Sequence[Row]) -> dict[Choice, dict[str, Row]]:
    """Rows by choice and suite."""
    found: dict[Choice, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.choice, {})[row.suite] = row
    return found


@dataclass(frozen=True)
class Judged:
    """What the rule looks at of one choice."""

    choice: Choice
    keeps: bool
    """Whether it has as many needles and chains right as full attention, but for what may be lost."""
    loss: float | None
    """The most that it loses of what full attention has right, over needles and chains; None if no suite tells."""
    agreement: float | None
    """The least over texts; None without texts."""
    read: float
    """Share of all tokens that it reads."""


def telling(rows: Sequence[Row]) -> list[str]:
    """Suites of needles and chains that full attention can do."""
    return [row.suite for row in by_choice(rows)[FULL].values() if row.task != "text" and row.whole.value >= _TELLS]


def judge(rows: Sequence[Row], points: float) -> list[Judged]:
    """Every choice but full attention's; `points` of 100 are what one may lose, or one item where that is more."""
    of_all = by_choice(rows)
    full, tell = of_all[FULL], telling(rows)
    texts = [row.suite for row in full.values() if row.task == "text"]
    allowed = {suite: max(points / 100, 1 / full[suite].items) + 1e-9 for suite in tell}
    found = []
    for choice, of_choice in of_all.items():
        if choice in (FULL, ROUNDING):
            continue
        losses = {suite: full[suite].whole.value - of_choice[suite].whole.value for suite in tell}
        one = Judged(
            choice,
            keeps=all(loss <= allowed[suite] for suite, loss in losses.items()),
            loss=max(losses.values(), default=None),
            agreement=min((of_choice[suite].agreement.value for suite in texts), default=None),
            read=sum(row.attended_fraction for row in of_choice.values()) / len(of_choice),
        )
        found.append(one)
    return found


def choose(judged: Sequence[Judged]) -> Judged | None:
    """The best choice, None if none keeps needles and chains.

    Of those that do, the ones within `ALIKE` of the best agreement; of these, the one that reads least.
    """
    kept = [one for one in judged if one.keeps]
    if not kept:
        return None
    best = max(one.agreement or 0.0 for one in kept)
    return min((one for one in kept if (one.agreement or 0.0) >= best - ALIKE), key=lambda one: one.read)


def verdict(rows: Sequence[Row], points: float) -> str:
    """One sentence: what to set, or that nothing does."""
    judged = judge(rows, points)
    if not judged:
        return "Only full attention was measured: name others with --methods."
    if all(one.loss is None and one.agreement is None for one in judged):
        return (
            f"Nothing can be said: full attention itself has less than {_TELLS:.0%} of needles and chains right; add "
            "text to --tasks, or take a shorter --context."
        )
    best = choose(judged)
    if best is None:
        near = min(judged, key=lambda one: (one.loss or 0.0, one.read))
        lost = 100 * (near.loss or 0.0)
        return (
            f"Nothing tried is within {points:g} points, or one item, of full attention: the nearest, "
            f"{near.choice.name}, loses {lost:.0f} points; try "
            "other --selection layers, more of them, or a larger budget."
        )
    known = [f"reads {best.read:.0%} of all tokens"]
    if best.agreement is not None:
        known.append(f"agrees with full attention on {best.agreement:.1%} of tokens or more")
    if best.loss is not None:
        suites = ", ".join(f"{suite} ({by_choice(rows)[FULL][suite].items})" for suite in telling(rows))
        known.append(f"loses at most {max(0.0, 100 * best.loss):.0f} points of {suites}")
    else:
        known.append("was tried on no needles or chains that full attention can do")
    return f"Set {best.choice.flags()}: of what was tried this is the best, as it {', '.join(known)}."
