"""What is searched: which layers select, and what these attend to."""

from dataclasses import dataclass

from sgl_lim.settings.layers import full_reads


@dataclass(frozen=True, order=True)
class Candidate:
    """Selection layers and what they attend to; the layers before the first one are dense."""

    layers: tuple[int, ...]
    attends: str
    """`context`, or `set`: the set that they choose by the keys alone."""

    @property
    def full_reads(self) -> float:
        """As `sgl_lim.settings.layers.full_reads`."""
        return full_reads(self.layers, self.attends)

    @property
    def name(self) -> str:
        """For tables and progress."""
        return f"{','.join(map(str, self.layers))} {self.attends}"
