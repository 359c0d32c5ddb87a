"""How budget forcing bounds a generation's thinking, for whoever plans a run without SGLang."""

from dataclasses import dataclass

DEFAULT_END = "</think>"


@dataclass(frozen=True)
class ThinkingBudget:
    """Where thinking may end, and what is said where it ends too early or too late.

    All texts are appended as they are, without a space or a newline of ours, but for the newline before an `end` that
    the model did not come to by itself.
    """

    least: int
    """Thinking that ends before this many tokens is continued, as long as there are `waits`; at most `most`."""
    most: int
    """Thinking is cut here, and the answer is asked for."""
    waits: int
    """How often an end is dropped, at most."""
    wait_text: str
    """Stands in place of a dropped end."""
    final_text: str
    """Follows thinking that was cut, behind `end`."""
    end: str
    """Ends the thinking, before the answer; empty where the end of the generation does, the answer included."""

    @property
    def cut_text(self) -> str:
        """What follows thinking that was cut."""
        return (f"\n{self.end}" if self.end else "") + self.final_text
