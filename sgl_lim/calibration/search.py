"""Which layers should select: the best choice there is, by dynamic programming over layers in exact arithmetic."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Recall = Sequence[Sequence[float]]
"""[layers][layers]: `[i][j]`, i < j, is the share of layer j's attention that the set of layer i covers."""


@dataclass(frozen=True)
class Choice:
    """Selection layers and what their sets cover."""

    selection_layers: tuple[int, ...]
    coverage: float
    """Mean share of attention covered, over the sparse layers."""
    lowest: float
    """The share covered at the sparse layer that is covered least."""
    lowest_layer: int


def best_layers(recall: Recall, *, selections: int, max_dense: int) -> Choice:
    """The `selections` layers whose sets cover most, in the mean over all sparse layers.

    Sparse layers are those after the first selection layer that do not select; each reads the set of the last selection
    layer before it. Layers before the first selection layer, at most `max_dense`, are dense. Of choices that cover
    equally much the one with the fewest dense layers wins, then the one whose layers come earliest. Sums are exact, so
    the result is the best and does not depend on the order of summation.

    Raises:
        ValueError: no choice leaves a sparse layer.
    """
    depth = len(recall)
    if selections < 1 or max_dense < 0 or selections >= depth:
        raise ValueError(f"{selections} selections leave no sparse layer in {depth} layers, or are none")
    spans = _spans(recall)
    # From each layer on that selects, with as many selections to come: what is covered at best, and who selects next.
    totals = [span[depth] for span in spans]
    choices: list[list[int]] = []
    for _ in range(selections - 1):
        # max keeps the first, hence earliest, of equals.
        following = [
            max(range(i + 1, len(totals)), key=lambda j, i=i: spans[i][j] + totals[j])  # type: ignore[misc]
            for i in range(len(totals) - 1)
        ]
        totals = [spans[i][j] + totals[j] for i, j in enumerate(following)]
        choices.append(following)
    firsts = range(min(max_dense + 1, depth - selections))
    layers = [max(firsts, key=lambda i: totals[i] / (depth - i - selections))]
    for following in reversed(choices):
        layers.append(following[layers[-1]])
    return measure(recall, tuple(layers))


def measure(recall: Recall, selection_layers: tuple[int, ...]) -> Choice:
    """What these selection layers cover.

    Raises:
        ValueError: they leave no sparse layer, or are not increasing layers of the model.
    """
    depth = len(recall)
    increasing = all(a < b for a, b in itertools.pairwise((-1, *selection_layers, depth)))
    sparse = [j for j in range(selection_layers[0], depth) if j not in selection_layers] if increasing else []
    if not sparse:
        raise ValueError(f"selection layers {selection_layers} leave no sparse layer in {depth} layers")
    covered = [(recall[max(i for i in selection_layers if i < j)][j], j) for j in sparse]
    lowest, layer = min(covered)
    mean = sum(Fraction(share) for share, _ in covered) / len(covered)
    return Choice(selection_layers, float(mean), lowest, layer)


def _spans(recall: Recall) -> list[list[Fraction]]:
    """[layers][layers + 1]: `[i][e]`, what the set of layer i covers in all layers after it and before e."""
    spans = []
    for i, row in enumerate(recall):
        sums = [Fraction(0)] * (i + 2)
        for share in row[i + 1 :]:
            sums.append(sums[-1] + Fraction(share))
        spans.append(sums)
    return spans
