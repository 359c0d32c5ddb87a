"""Which layers to try next, by what their sets miss of the attention of the layers that read them.

What a layer misses does not say what that costs: some layers hardly matter, and errors of early ones are carried
through all later ones. So each layer has a weight. It begins with the number of layers from it on, and is fitted to the
divergences of the candidates that were tried; the best candidates by the fit are tried next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgl_lim.calibrate.candidates import Candidate

Recall = Sequence[Sequence[float]]
"""[layers][layers]: `[i][j]`, i <= j, is the share of layer j's attention that the set of layer i covers."""

_TRUST = 0.003
"""How strongly the fit holds to the weights that it began with: so much as so many candidates contradict it."""
_SWEEPS = 200
"""Of coordinate descent."""


@dataclass(frozen=True)
class Model:
    """A candidate's expected divergence: the weighted sum of what its layers miss."""

    missed: NDArray[np.float64]  # [layers, layers], [i, j] for i <= j
    weights: NDArray[np.float64]  # [layers], not negative

    @classmethod
    def by_depth(cls, recall: Recall) -> "Model":
        """Before anything was tried: each layer by the number of layers from it on."""
        depth = len(recall)
        return cls(1.0 - np.asarray(recall, dtype=np.float64), np.arange(depth, 0.0, -1.0) / depth)

    def expected(self, candidate: Candidate) -> float:
        """Divergence by this model, in nats once it was fitted."""
        return float(self._features(candidate) @ self.weights)

    def fitted(self, tried: Iterable[tuple[Candidate, float]]) -> "Model":
        """With weights for these divergences, each counted by its ratio to the expected one."""
        found = list(tried)
        divergences = np.array([max(divergence, 1e-6) for _, divergence in found])
        # Column j is layer j's part of the divergence, if its weight were the old one.
        parts = np.stack([self._features(candidate) for candidate, _ in found]) * self.weights / divergences[:, None]
        scale = 1.0 / max(float(np.median(parts.sum(1))), 1e-12)
        factors = _descend(parts * scale, trust=_TRUST)
        return Model(self.missed, self.weights * scale * factors)

    def best(self, attends: str, *, dense: range, most: int) -> list[Candidate]:
        """The best candidate for each number of dense layers and each of 1 … `most` selections."""
        depth = len(self.weights)
        cost = self.weights * self.missed
        own = np.diag(cost) if attends == "set" else np.zeros(depth)
        # [i, e]: what layers i < j < e miss of the set of layer i.
        spans = np.zeros((depth, depth + 1))
        spans[:, 1:] = np.cumsum(np.triu(cost, k=1), axis=1)
        totals = own + spans[:, depth]
        chains: list[tuple[int, ...]] = [(i,) for i in range(depth)]
        found: list[Candidate] = []
        for count in range(1, most + 1):
            if count > 1:
                totals, chains = _one_more(own, spans, totals, chains)
            found += [Candidate(chains[i], attends) for i in dense if np.isfinite(totals[i])]
        return [one for one in found if one.layers[0] + len(one.layers) < depth]

    def _features(self, candidate: Candidate) -> NDArray[np.float64]:
        """[layers]: what each layer misses under a candidate."""
        layers, depth = candidate.layers, len(self.weights)
        found = np.zeros(depth)
        for first, end in zip(layers, (*layers[1:], depth), strict=True):
            found[first + 1 : end] = self.missed[first, first + 1 : end]
            if candidate.attends == "set":
                found[first] = self.missed[first, first]
        return found


def neighbours(candidate: Candidate, depth: int, max_dense: int) -> list[Candidate]:
    """Candidates that differ by one selection layer: moved by one or two, dropped, or added."""
    layers = set(candidate.layers)
    found = [layers - {layer} for layer in layers]
    found += [layers - {layer} | {layer + by} for layer in layers for by in (-2, -1, 1, 2)]
    found += [layers | {layer} for layer in range(depth)]
    made = {tuple(sorted(one)) for one in found if one and one != layers}
    fits = (one for one in made if 0 <= one[0] <= max_dense and one[-1] < depth and one[0] + len(one) < depth)
    return [Candidate(one, candidate.attends) for one in sorted(fits)]


def swaps(candidate: Candidate, depth: int) -> list[Candidate]:
    """Candidates that differ by one selection layer behind the first, put anywhere else behind it."""
    first, *others = candidate.layers
    made = {
        (first, *sorted({*others} - {gone} | {new}))
        for gone in others
        for new in range(first + 1, depth)
        if new not in others
    }
    return [Candidate(one, candidate.attends) for one in sorted(made)]


def spaced(depth: int, max_dense: int, attends: str) -> list[Candidate]:
    """Every third to eighth layer, from several first layers on; no layer would read what the last one chose."""
    steps = ((step, first) for step in (3, 4, 5, 6, 8) for first in range(min(step, max_dense + 1)))
    made = [tuple(range(first, depth - 1, step)) for step, first in steps]
    return [Candidate(layers, attends) for layers in dict.fromkeys(made) if layers]


def _one_more(
    own: NDArray[np.float64], spans: NDArray[np.float64], totals: NDArray[np.float64], chains: list[tuple[int, ...]]
) -> tuple[NDArray[np.float64], list[tuple[int, ...]]]:
    """From each layer on, the best with one selection more than `totals` and `chains` have."""
    depth = len(own)
    better, longer = np.full(depth, np.inf), list(chains)
    for i in range(depth - 1):
        # argmin takes the first of equals.
        following = spans[i, i + 1 : depth] + totals[i + 1 :]
        j = i + 1 + int(np.argmin(following))
        better[i], longer[i] = own[i] + following[j - i - 1], (i, *chains[j])
    return better, longer


def _descend(parts: NDArray[np.float64], *, trust: float) -> NDArray[np.float64]:
    """Factors [layers], not negative, for which the rows of `parts` sum to about 1, near to 1 themselves."""
    factors = np.ones(parts.shape[1])
    rest = 1.0 - parts.sum(1)
    curves = (parts**2).sum(0) + trust
    for _ in range(_SWEEPS):
        for j in range(len(factors)):
            slope = parts[:, j] @ rest - trust * (factors[j] - 1.0)
            moved = max(0.0, factors[j] + slope / curves[j])
            rest -= parts[:, j] * (moved - factors[j])
            factors[j] = moved
    return factors
