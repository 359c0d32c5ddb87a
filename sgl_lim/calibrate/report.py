"""What a calibration shows: the recall matrix as text, as CSV and as a heat map."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgl_lim.calibrate.recording import Recording
from sgl_lim.calibrate.search import Choice, Recall
from sgl_lim.settings.preset_file import PresetFile

CSV_FIELDS = ("budget", "chosen_at", "read_at", "coverage", "rows")


def matrix_text(recall: Recall) -> str:
    """The recall matrix in whole percent; a row is the layer that chose, a column the layer that reads."""
    depth = len(recall)
    lines = ["set of   " + "".join(f"{j:4d}" for j in range(depth)) + "   <- attention of layer"]
    for i, row in enumerate(recall):
        cells = "".join("   ." if j < i else f"{100 * share:4.0f}" for j, share in enumerate(row))
        lines.append(f"layer {i:2d} {cells}")
    return "\n".join(lines)


def choice_text(choice: Choice, depth: int) -> str:
    """One line: layers, mean, weighted and lowest coverage."""
    sparse = depth - choice.selection_layers[0] - len(choice.selection_layers)
    return (
        f"selection layers {','.join(map(str, choice.selection_layers))}: {choice.coverage:.2%} of the attention of "
        f"{sparse} sparse layers ({choice.weighted_coverage:.2%} weighted by depth), "
        f"least at layer {choice.lowest_layer}: {choice.lowest:.2%}"
    )


def write_csv(path: Path, recording: Recording) -> None:
    """One row for each budget, layer that chose and layer that reads. Raises OSError."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_FIELDS)
        for budget, recall in recording.recall.items():
            for i, row in enumerate(recall):
                for j in range(i, len(row)):
                    writer.writerow((budget, i, j, f"{row[j]:.6f}", recording.rows[budget]))


def draw_heat_map(path: Path, recall: Mapping[int, Recall], preset: PresetFile, title: str) -> None:
    """A panel for each budget, with the preset's choice.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `path` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depth = preset.num_layers
    figure, axes = pyplot.subplots(
        1, len(recall), squeeze=False, figsize=(4 * len(recall) + 1, 4.6), layout="constrained"
    )
    for axis, entry in zip(axes[0], preset.entries, strict=True):
        shown = axis.imshow(_upper(recall[entry.budget]), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        for layer in entry.selection_layers:
            axis.axhline(layer, color="red", linewidth=0.8)
        layers = ", ".join(map(str, entry.selection_layers))
        axis.set_title(
            f"budget {entry.budget}: layers {layers} cover {entry.measured['coverage']:.1%}, plain mean", fontsize=9
        )
        axis.set_xlabel("attention of layer")
        ticks = range(0, depth, max(1, depth // 12))
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
    axes[0][0].set_ylabel("set chosen at layer")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(shown, ax=list(axes[0]), label="share of attention covered", shrink=0.8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _upper(recall: Recall) -> Sequence[Sequence[float]]:
    """The matrix with NaN, which is left blank, where a layer would read what a later one chose."""
    return [[share if j >= i else float("nan") for j, share in enumerate(row)] for i, row in enumerate(recall)]
