"""Figures from the benchmarks' CSV files.

    python -m benchmarks.plot decode out/decode_step.csv -o decode.png        # ms a step by context and by batch
    python -m benchmarks.plot speedup out/decode_step.csv -o speedup.png      # ratio to the first backend, by case
    python -m benchmarks.plot speedup out/decode_step.csv --column pipelined_ratio -o speedup.png
    python -m benchmarks.plot throughput out/throughput.csv -o throughput.png # output tokens/s, by workload
    python -m benchmarks.plot accuracy out/methods.csv -o methods.png         # chains right, by tokens attended
    python -m benchmarks.plot accuracy out/text.csv --column agreement --methods full,lessismore,window -o text.png

Rows with an error are left out; of rows measured twice, the last counts.
"""

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_lim import command

Row = dict[str, str]
# Okabe and Ito's colours, told apart with any colour vision; the baseline is grey.
COLOURS = ["#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "os^Dvpx"


def read_rows(path: Path) -> list[Row]:
    """Rows without an error. Raises SystemExit if there are none."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row.get("error")]
    if not rows:
        raise SystemExit(f"{path} has no row without an error")
    return rows


def label(row: Row, rows: Iterable[Row]) -> str:
    """A backend's name, the settings that not all rows of that name have, and its slots where they differ."""
    rows = list(rows)
    name, _, settings = row["backend"].partition(":")
    others = [set(other["backend"].partition(":")[2].split(",")) for other in rows if _name(other) == name]
    common = set.intersection(*others) if len({frozenset(other) for other in others}) > 1 else set()
    kept = ",".join(setting for setting in settings.split(",") if setting not in common)
    where = f", {row['slots']} slots" if len({other.get("slots", "") for other in rows}) > 1 else ""
    return name + (f":{kept}" if kept else "") + where


def _name(row: Row) -> str:
    return row["backend"].partition(":")[0]


def most_covered(rows: list[Row], fixed: str, along: str) -> int:
    """The value of column `fixed` measured at most values of `along`; of equals the largest."""
    points = Counter(fixed_value for fixed_value, _ in {(int(row[fixed]), int(row[along])) for row in rows})
    return max(points, key=lambda value: (points[value], value))


def lines(rows: list[Row], fixed: str, value: int, along: str) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds a step along one column where another is fixed, by backend: sorted (x, ms)."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        points = found[label(row, rows)]  # also a backend without a point keeps its place and colour
        if int(row[fixed]) == value:
            points[int(row[along])] = float(row["step_ms"])
    return {name: sorted(points.items()) for name, points in found.items()}


def case_name(row: Row) -> str:
    """`batch x context`, or what the requests share."""
    if row.get("prefixes"):
        return f"{row['batch']} on {row['prefixes']}"
    return f"{row['batch']} x {int(row['context']):,}"


def ratios(rows: list[Row], column: str = "ratio") -> dict[str, dict[str, float]]:
    """Ratio to the first backend, by backend and case; the first backend itself is left out."""
    first = rows[0]["backend"]
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["backend"] != first and row.get(column):
            found[label(row, rows)][case_name(row)] = float(row[column])
    return dict(found)


def throughputs(rows: list[Row], column: str = "tokens_per_s") -> dict[str, dict[str, float]]:
    """Output tokens/s by server and workload. Raises SystemExit if no row has that column."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if not row.get(column):
            continue
        workload = f"{int(row['input_len']):,} in, {int(row['output_len']):,} out"
        found[row["server"]][workload] = float(row[column])
    if not found:
        raise SystemExit(f"no row has {column}; columns are {', '.join(rows[0])}")
    return dict(found)


def machines(rows: list[Row]) -> str:
    """Device, torch and SGLang of each machine line in the rows."""
    found = []
    for line in dict.fromkeys(row.get("machine", "") for row in rows):
        device, *versions = line.split("; ")
        kept = [version for version in versions if version.startswith(("torch ", "sglang "))]
        found.append("; ".join([device.split(", driver")[0], *kept]))
    return " | ".join(dict.fromkeys(filter(None, found)))


def require_matplotlib() -> None:
    """Raises SystemExit, with the command that installs it, if matplotlib is missing or does not load."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        install = command.how_to_install("matplotlib")
        raise SystemExit(f"plotting needs matplotlib ({error}); install it with: {install}") from None


def new_figure(panels: int, caption: str) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * max(panels, 1.7), 4.2), dpi=150, layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    # A label of the figure, so that the layout leaves room for it.
    figure.supxlabel(caption, fontsize=7, color="0.4")
    return figure, axes


def draw_lines(ax: Any, found: dict[str, list[tuple[int, float]]], xlabel: str, title: str) -> None:
    """Milliseconds a step, both axes logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for i, (name, points) in enumerate(found.items()):
        x, y = [x for x, _ in points], [y for _, y in points]
        ax.plot(x, y, label=name, color=COLOURS[i % 7], marker=MARKERS[i % 7], markersize=4.5, linewidth=1.6)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted({x for points in found.values() for x, _ in points}))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=xlabel, ylabel="ms per decode step", title=title)


def draw_bars(ax: Any, found: dict[str, dict[str, float]], form: str, first_colour: int) -> None:
    """Grouped bars with their values, a group a case."""
    from matplotlib.ticker import StrMethodFormatter

    cases = list(dict.fromkeys(case for values in found.values() for case in values))
    width = 0.8 / len(found)
    for i, (name, values) in enumerate(found.items()):
        shown = [(at, values[case]) for at, case in enumerate(cases) if case in values]
        places = [at + width * (i - (len(found) - 1) / 2) for at, _ in shown]
        colour = COLOURS[(i + first_colour) % 7]
        bars = ax.bar(places, [value for _, value in shown], width * 0.95, label=name, color=colour)
        # White behind the figures: a line may pass there.
        ax.bar_label(bars, fmt=form, fontsize=6, padding=1, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
    ax.set_xticks(range(len(cases)), cases, fontsize=8, rotation=25)
    ax.tick_params(axis="x", length=0)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def add_legend(figure: Any, ax: Any) -> None:
    """One legend above all panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), 1 + 90 // max(map(len, labels))),
        frameon=False,
        fontsize=8,
    )


def decode_figure(rows: list[Row], batch: int | None = None, context: int | None = None) -> Any:
    """Two panels: against context at one batch, against batch at one context; by default those measured most."""
    batch = batch or most_covered(rows, "batch", "context")
    context = context or most_covered(rows, "context", "batch")
    figure, (left, right) = new_figure(2, machines(rows))
    draw_lines(left, lines(rows, "batch", batch, "context"), "context, tokens", f"batch {batch}")
    draw_lines(right, lines(rows, "context", context, "batch"), "batch, requests", f"context {context:,} tokens")
    add_legend(figure, left)
    return figure


def speedup_figure(rows: list[Row], column: str = "ratio") -> Any:
    """Bars of the ratio by case, a line at 1. Raises SystemExit if no row has a ratio to another backend."""
    found = ratios(rows, column)
    if not found:
        raise SystemExit("no row has a ratio to another backend")
    figure, (ax,) = new_figure(1, machines(rows))
    draw_bars(ax, found, "%.2f", first_colour=1)
    ax.axhline(1, color=COLOURS[0], linewidth=1.2, zorder=0.5)
    ax.set(xlabel="requests x tokens, or requests on shared prefixes", ylabel=f"times as fast as {rows[0]['backend']}")
    add_legend(figure, ax)
    return figure


def throughput_figure(rows: list[Row], column: str = "tokens_per_s") -> Any:
    """Bars of output tokens/s by workload."""
    figure, (ax,) = new_figure(1, machines(rows))
    draw_bars(ax, throughputs(rows, column), "{:,.0f}", first_colour=0)
    ax.set(xlabel="tokens per request", ylabel="output tokens/s")
    add_legend(figure, ax)
    return figure


@dataclass(frozen=True)
class Point:
    """A method at one budget: what it reads, and a share with its 95% interval in percent."""

    tokens: float  # KV tokens that a generated token reads in a layer, mean over all layers
    share: float  # of their context that sparse layers read, percent
    value: float
    low: float
    high: float


def accuracies(rows: list[Row], column: str = "whole", methods: Collection[str] = ()) -> dict[str, list[Point]]:
    """Points by method, from the benches of `training`, in the order of budgets; of all methods if none is named.

    Where one was measured with several choices of selection layers, each is a method of its own.
    An interval is in the columns `…_low` and `…_high`, or half of it in `…±`; without these it has no width.
    """
    several = len({row.get("selection_layers") for row in rows if row["method"] == "lessismore"}) > 1
    found: dict[str, dict[str, Point]] = defaultdict(dict)
    for row in rows:
        if not row.get(column) or (methods and row["method"] not in methods):
            continue
        name = f"{row['method']} {row['selection_layers']}" if several and row["selection_layers"] else row["method"]
        value, half = float(row[column]), float(row.get(f"{column}±") or 0)
        low, high = float(row.get(f"{column}_low") or value - half), float(row.get(f"{column}_high") or value + half)
        shares = (100 * s for s in (float(row["attended"]), value, low, high))
        found[name][row["budget"]] = Point(float(row["attended_tokens"]), *shares)
    measured = {row["method"] for row in rows if row.get(column)}
    if missing := [method for method in methods if method not in measured]:
        raise SystemExit(f"no row of {', '.join(missing)} has {column}")
    if not found:
        raise SystemExit(f"no row has {column}; columns are {', '.join(rows[0])}")
    return {name: sorted(points.values(), key=lambda p: p.tokens) for name, points in found.items()}


def accuracy_figure(rows: list[Row], column: str = "whole", methods: Collection[str] = ()) -> Any:
    """Lines of a share, left against tokens over all layers, right against what sparse layers read."""
    from matplotlib.ticker import StrMethodFormatter

    device, torch = rows[0].get("device", ""), rows[0].get("torch", "")
    caption = f"{rows[0].get('items', '')} items of {rows[0].get('size', '')}; {device}; torch {torch}"
    figure, axes = new_figure(2, caption)
    found = accuracies(rows, column, methods)
    others = [name for name in found if name != "full"]
    for name, points in found.items():
        full = name == "full"
        # The baseline's grey is nobody else's; those of a second round are dashed.
        again, place = (0, 0) if full else divmod(others.index(name), len(COLOURS) - 1)
        i = 0 if full else 1 + place
        y = [p.value for p in points]
        spread = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4.5, "capsize": 2.5}
        for ax, x in zip(axes, ([p.tokens for p in points], [p.share for p in points]), strict=True):
            ax.errorbar(x, y, yerr=spread, label=name, linewidth=1.4, linestyle="--" if again else "-", **style)
            if full:
                ax.axhline(y[0], color=COLOURS[0], linewidth=1, zorder=0.5)
    for ax, label in zip(
        axes,
        ("KV tokens attended, mean over all layers", "share of the context that sparse layers attend to, %"),
        strict=True,
    ):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
        ax.set(xlabel=label)
    axes[0].set(ylabel=f"{column}, % (95% intervals)")
    add_legend(figure, axes[0])
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name in ("decode", "speedup", "throughput", "accuracy"):
        figure = figures.add_parser(name)
        figure.add_argument("csv", type=Path)
        figure.add_argument("-o", "--output", type=Path, required=True, help="PNG, SVG or PDF")
        if name == "decode":
            figure.add_argument("--batch", type=int, help="of the left panel")
            figure.add_argument("--context", type=int, help="of the right panel")
        if name == "speedup":
            figure.add_argument("--column", default="ratio", help="the CSV's column of ratios")
        if name == "throughput":
            figure.add_argument("--column", default="tokens_per_s", help="the CSV's column of tokens/s")
        if name == "accuracy":
            figure.add_argument("--column", default="whole", help="the CSV's column of shares")
            figure.add_argument("--methods", type=lambda t: t.split(","), default=(), help="by commas; default: all")
    args = parser.parse_args(argv)
    require_matplotlib()
    rows = read_rows(args.csv)
    if args.figure == "decode":
        drawn = decode_figure(rows, args.batch, args.context)
    elif args.figure == "speedup":
        drawn = speedup_figure(rows, args.column)
    elif args.figure == "throughput":
        drawn = throughput_figure(rows, args.column)
    else:
        drawn = accuracy_figure(rows, args.column, args.methods)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(args.output)


if __name__ == "__main__":
    command.run(main)
