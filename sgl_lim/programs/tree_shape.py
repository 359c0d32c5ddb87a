"""The shape of a tree of thought, for whoever plans one without SGLang."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TreeShape:
    """How a tree of thought grows; `branches` is a multiple of `keep`."""

    branches: int
    """Thoughts of a round, over all paths that were kept."""
    keep: int
    """Paths that a round leaves."""
    depth: int
    """Rounds before the answer."""
    thought_tokens: int
    """Most tokens of a thought."""

    @property
    def path_tokens(self) -> int:
        """Most tokens of the thoughts that one answer follows."""
        return self.depth * self.thought_tokens
