"""A picture of the figures: what each choice keeps, by what it reads."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_lim.command import how_to_install
from sgl_lim.evaluate.choices import FULL, ROUNDING
from sgl_lim.evaluate.measure import Row, Share

# Okabe and Ito's colours, told apart with any colour vision; full attention is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "s^Dvpxo"
_GREY = "#444444"
# Of the legend's font; handles and the gaps beside them are as wide as so many letters.
_INCHES_A_LETTER, _LETTERS_A_HANDLE = 0.065, 8


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one suite by method and selection layers, by what they read."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.choice == ROUNDING:
            continue
        name = " ".join(filter(None, (row.choice.spec, ",".join(map(str, row.choice.layers)))))
        found.setdefault(name, []).append(row)
    return {name: sorted(of_name, key=lambda row: row.attended_fraction) for name, of_name in found.items()}


def shown(row: Row) -> Share:
    """The figure of a suite: agreement of texts, else what is right."""
    return row.agreement if row.task == "text" else row.whole


def draw(rows: Sequence[Row], path: Path, title: str) -> list[Path]:
    """A panel a suite; returns the files written, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no plot: matplotlib is not installed; {how_to_install('matplotlib')}", file=sys.stderr)
        return []
    suites = list(dict.fromkeys(row.suite for row in rows))
    width = 3.6 * max(2, len(suites))
    figure = Figure(figsize=(width, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = [figure.add_subplot(1, len(suites), place + 1) for place in range(len(suites))]
    for ax, suite in zip(axes, suites, strict=True):
        _panel(ax, lines([row for row in rows if row.suite == suite]))
        ax.set_title(suite, fontsize=9)
    axes[0].set_ylabel("texts: agreement, others: right; %, 95% intervals", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, int(width / (_INCHES_A_LETTER * (max(map(len, labels)) + _LETTERS_A_HANDLE))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
    figure.savefig(path)
    return [path]


def _panel(ax: Any, found: dict[str, list[Row]]) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    others = [name for name in found if name != FULL.spec]
    for name, rows in found.items():
        place = -1 if name == FULL.spec else others.index(name)
        values = [shown(row) for row in rows]
        spread = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
        ax.errorbar(
            [100 * row.attended_fraction for row in rows],
            [100 * v.value for v in values],
            yerr=spread,
            label=name,
            color=_GREY if place < 0 else COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="--" if place >= len(COLOURS) else "-",
            linewidth=1.4,
            markersize=4.5,
            capsize=2.5,
        )
    ax.set_xlabel("share of all tokens that are read, %", fontsize=8)
    ax.tick_params(labelsize=7)
