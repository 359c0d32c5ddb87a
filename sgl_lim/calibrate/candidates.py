"""What is searched: which layers select, and what these attend to."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Candidate:
    """Selection layers and what they attend to; the layers before the first one are dense."""

    layers: tuple[int, ...]
    attends: str
    """`context`, or `set`: the set that they choose by the keys alone."""

    @property
    def full_reads(self) -> float:
        """Layers that are read whole in a step: keys alone are half of what a layer has."""
        return self.layers[0] + len(self.layers) * (0.5 if self.attends == "set" else 1.0)

    @property
    def name(self) -> str:
        """For tables and progress."""
        return f"{','.join(map(str, self.layers))} {self.attends}"
