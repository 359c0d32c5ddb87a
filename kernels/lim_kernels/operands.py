"""What operators take beside tensors: how logits and cached values are scaled, and how large a set is."""

from dataclasses import dataclass

from lim_kernels.dispatch import require


@dataclass(frozen=True)
class Scaling:
    """What logits and stored values are multiplied by in one layer."""

    scale: float
    """Factor on q·k."""
    logit_cap: float = 0.0
    """c > 0 turns a scaled logit x into c·tanh(x / c); 0 leaves it."""
    k_scale: float = 1.0
    """What a stored key is multiplied by, for quantised caches."""
    v_scale: float = 1.0
    """What a stored value is multiplied by."""


@dataclass(frozen=True)
class SetSizes:
    """How many tokens a set has: sinks, those chosen by rank, and a recency window."""

    budget: int
    """Tokens in a set, at most."""
    recent: int
    """Length of the recency window: the last tokens of a row, the current one included."""
    sinks: int
    """Leading tokens of a row that every set has."""

    @property
    def middle(self) -> int:
        """The middle budget: tokens chosen by rank."""
        return self.budget - self.recent - self.sinks

    def check(self, op: str) -> None:
        """Raise ValueError unless the budget covers sinks and window.

        Args:
            op: operator name, for the message.
        """
        require(
            self.budget >= 1 and self.recent >= 0 and self.sinks >= 0 and self.middle >= 0,
            op,
            "budget >= recent + sinks, none negative",
            f"budget={self.budget}, recent={self.recent}, sinks={self.sinks}",
        )
