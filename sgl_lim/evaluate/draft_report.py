"""Runs rounds of drafts over suites, and writes what was accepted: rows of a CSV file, and a table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.choices import FULL, Choice
from sgl_lim.evaluate.drafts import WAYS, Accepted, KnownText, Rounds, Way, accepted
from sgl_lim.evaluate.items import ItemError, Suite
from sgl_lim.evaluate.output import RowsFile, aligned
from sgl_lim.programs.intervals import clustered_interval
from sgl_lim.settings.draft_methods import draft_problems


@dataclass(frozen=True)
class DraftRow:
    """What one way of drafting had accepted on one suite."""

    suite: str
    choice: Choice
    way: Way
    accepted: Accepted
    seconds: float

    @property
    def layers(self) -> str:
        """Those that choose sets."""
        return "every" if self.way.every_layer else "-".join(map(str, self.choice.layers))

    @property
    def run(self) -> float:
        """Drafts that are accepted in a round, mean over texts."""
        return statistics.fmean(self.accepted.run)


def measure_drafts(
    checkpoint: Checkpoint, suite: Suite, choices: Sequence[Choice], drafts: int, done: Callable[[int], None]
) -> list[DraftRow]:
    """A row for each choice and each way in which its method can draft.

    Args:
        drafts: of a round.
        done: is told how many tokens were decided, as they are.

    Raises:
        ItemError: a text is too short for a round.
    """
    texts: list[KnownText] = []
    spans = []
    for item in suite.items:
        tokens, start = [*item.prompt, *item.right], len(item.prompt)
        if len(item.right) <= drafts or start <= drafts + 1:
            raise ItemError(f"{suite.name}: items end before a round of {drafts} drafts does; lower --drafts")
        texts.append(KnownText(checkpoint, tokens, start - drafts - 1, texts[0] if texts else None))
        spans.append((start, len(tokens)))
    found, pool = [], texts[0].prompt.pool
    for choice, way in ways_of(choices):
        began, used = time.monotonic(), pool.used
        with torch.inference_mode():
            one = accepted(Rounds(checkpoint, texts, choice.method, way, drafts), spans, drafts, done)
        pool.used = used
        found.append(DraftRow(suite.name, choice, way, one, time.monotonic() - began))
    return found


def ways_of(choices: Sequence[Choice]) -> list[tuple[Choice, Way]]:
    """In which ways each method that can draft does; sets of every layer do not depend on selection layers."""
    found: dict[tuple[object, ...], tuple[Choice, Way]] = {}
    for choice in choices:
        if choice == FULL or draft_problems(choice.method, guided=False):
            continue
        guided = not draft_problems(choice.method, guided=True)
        for way in WAYS:
            if guided or not way.queries:
                layers = () if way.every_layer else choice.layers
                found.setdefault((choice.spec, choice.budget, layers, way), (choice, way))
    return list(found.values())


def draft_file(path: Path, drafts: int, where: Mapping[str, str]) -> RowsFile:
    """The CSV file of what was accepted, which takes `csv_row`s; the columns of `where` are equal in every row."""
    places = [f"at_{place}" for place in range(1, drafts + 1)]
    names = ("suite", "method", "budget", "selection_layers", "drafts", "sets_by", "texts", "rounds")
    return RowsFile(path, (*names, "accepted", "accepted_low", "accepted_high", *places, "seconds", *where), where)


def csv_row(row: DraftRow, drafts: int) -> dict[str, str]:
    """Columns by name."""
    texts, rounds = len(row.accepted.run), row.accepted.rounds
    low, high = interval(row, drafts)
    found = {"suite": row.suite, "method": row.choice.spec, "budget": str(row.choice.budget or "")}
    found["selection_layers"] = row.layers
    found |= {"drafts": str(drafts), "sets_by": row.way.name, "texts": str(texts), "rounds": str(rounds)}
    found |= {"accepted": f"{row.run:.3f}", "accepted_low": f"{low:.3f}", "accepted_high": f"{high:.3f}"}
    found |= {f"at_{place}": f"{chance:.4f}" for place, chance in enumerate(row.accepted.at, 1)}
    return found | {"seconds": f"{row.seconds:.1f}"}


def interval(row: DraftRow, drafts: int) -> tuple[float, float]:
    """95% interval of the drafts that are accepted; rounds of one text are not independent."""
    runs = row.accepted.run
    shares = [run / drafts for run in runs]
    found = clustered_interval(shares, max(1, round(row.accepted.rounds / len(runs))))
    return (row.run, row.run) if found is None else (drafts * found[0], drafts * found[1])


def draft_table(rows: Sequence[DraftRow], drafts: int) -> str:
    """A line for each suite, choice and way: drafts accepted in a round, and the chance at each place."""
    lines = [["suite", "method", "layers", "budget", "sets by", f"accepted of {drafts}", "at each place, in percent"]]
    for row in rows:
        low, high = interval(row, drafts)
        lines.append(
            [
                row.suite,
                row.choice.spec,
                row.layers.replace("-", ",") or "-",
                str(row.choice.budget or "-"),
                row.way.name,
                f"{row.run:.2f} [{low:.1f}, {high:.1f}]",
                " ".join(f"{100 * chance:.0f}" for chance in row.accepted.at),
            ]
        )
    return aligned(lines)
