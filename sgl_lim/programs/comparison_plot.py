"""A comparison as a figure: accuracy with its interval against attended tokens."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_lim import command

# Okabe and Ito's colours, told apart with any colour vision; the first server is grey.
_COLOURS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dvpx"


class PlotError(RuntimeError):
    """There is no figure; the message says why, and the way out."""


def points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float, float, float]]:
    """Name, attended tokens, accuracy and its interval, of the rows that have all of them."""
    names = ("attended_tokens", "accuracy", "accuracy_low", "accuracy_high")
    complete = [row for row in rows if all(row[name] is not None for name in names)]
    return [(row["server"], *(row[name] for name in names)) for row in complete]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure; its format is the suffix's.

    Raises:
        PlotError: matplotlib is missing, or no row has a point.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            f"the plot needs matplotlib ({error}); install it with: {command.how_to_install('matplotlib')}\n"
            "and run the same command again: nothing is asked twice"
        ) from error
    found = points(rows)
    if not found:
        raise PlotError("no server has both an accuracy and attended tokens, so there is nothing to plot")
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for at, (name, x, y, low, high) in enumerate(found):
        colour, marker = _COLOURS[at % 7], _MARKERS[at % 7]
        spread = [[100 * (y - low)], [100 * (high - y)]]
        ax.errorbar([x], [100 * y], yerr=spread, label=name, color=colour, marker=marker, capsize=3, linestyle="none")
    ax.set_xlim(left=0)
    ax.set(xlabel="KV tokens attended, a generated token and layer", ylabel=f"{rows[0]['metric']}, % (95% intervals)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(found), 4), frameon=False, fontsize=8)
    caption = "; ".join(filter(None, (f"{rows[0]['program']}, {rows[0]['problems']} problems", rows[0]["machine"])))
    # A machine's name is no formula, whatever dollar signs it has.
    figure.supxlabel(textwrap.fill(caption, 110), fontsize=7, color="0.4", parse_math=False)
    figure.savefig(path)
