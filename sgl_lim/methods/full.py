"""Dense decode through the same backend: the control in which nothing is sparse."""

from dataclasses import dataclass

from sgl_lim.methods.base import Method, Role


@dataclass(frozen=True)
class Full(Method):
    """Every layer attends to the whole context."""

    name = "full"

    def role(self, layer: int) -> Role:
        """Dense, always."""
        return Role.DENSE
