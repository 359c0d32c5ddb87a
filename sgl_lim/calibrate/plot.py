"""The picture: agreement by what is read whole, and the coverage that candidates were proposed by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_lim.calibrate.job import Result
from sgl_lim.calibrate.outcome import Outcome
from sgl_lim.calibrate.search import Recall
from sgl_lim.evaluate.plot import COLOURS, MARKERS

_GREY = "#999999"


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Two panels a budget.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4 * len(results)), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for place, result in enumerate(results):
        _frontier(figure.add_subplot(len(results), 2, 2 * place + 1), result)
        _heat_map(figure, figure.add_subplot(len(results), 2, 2 * place + 2), result)
    # No date in the file: equal commands write equal ones.
    figure.savefig(path, metadata={"Software": None})


def _frontier(axis: Any, result: Result) -> None:
    axis.set_title(f"budget {result.budget}: what was held out, 95% intervals", fontsize=9)
    _points(axis, result.searched, label="search part", color=_GREY, marker=".", alpha=0.6)
    _errors(axis, result.frontier, label="frontier", color=COLOURS[0], marker="o")
    for place, (name, one) in enumerate(result.named.items()):
        _errors(
            axis, [one], label=name, color=COLOURS[1 + place % (len(COLOURS) - 1)], marker=MARKERS[place % len(MARKERS)]
        )
    _errors(axis, [result.chosen], label="chosen", color="black", marker="*")
    axis.set_xlabel("layers read whole", fontsize=8)
    axis.set_ylabel("agreement with full attention, %", fontsize=8)
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, frameon=False, loc="lower right")


def _points(axis: Any, outcomes: Sequence[Outcome], **style: Any) -> None:
    reads = [one.candidate.full_reads for one in outcomes]
    axis.plot(reads, [100 * one.agreement.value for one in outcomes], linestyle="", **style)


def _errors(axis: Any, outcomes: Sequence[Outcome], **style: Any) -> None:
    shares = [one.agreement for one in outcomes]
    spread = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
    reads = [one.candidate.full_reads for one in outcomes]
    line = "-" if len(outcomes) > 1 else ""
    axis.errorbar(reads, [100 * s.value for s in shares], yerr=spread, linestyle=line, capsize=2, markersize=5, **style)


def _heat_map(figure: Any, axis: Any, result: Result) -> None:
    shown = axis.imshow(_upper(result.recall), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    for layer in result.chosen.candidate.layers:
        axis.axhline(layer, color="red", linewidth=0.8)
    axis.set_title("attention that a set covers: it proposes, and does not decide", fontsize=9)
    axis.set_xlabel("attention of layer", fontsize=8)
    axis.set_ylabel("set chosen at layer", fontsize=8)
    axis.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axis, shrink=0.8)


def _upper(recall: Recall) -> list[list[float]]:
    """The matrix with NaN, which is left blank, where a layer would read what a later one chose."""
    return [[share if j >= i else float("nan") for j, share in enumerate(row)] for i, row in enumerate(recall)]
