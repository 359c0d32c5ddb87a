"""TidalDecode (arXiv 2410.05076): each head's own best tokens at two layers, used again by the layers after them.

By its own rule a set is what ranks best and nothing else: neither sinks nor a window are kept. The paper has a set for
each query head. Here each KV head has one, merged from the lists of its query heads by `aggregate`, because query heads
that read one KV head read its tokens together; with as many KV heads as query heads the two are the same.
"""

from dataclasses import dataclass

from sgl_lim.methods.parameters import Choice, parameter
from sgl_lim.methods.ranked import Ranked


@dataclass(frozen=True)
class TidalDecode(Ranked):
    """Ranks all tokens for each KV head at the selection layers; no sinks, no window."""

    name = "tidaldecode"

    scope: str = parameter("kv_head", Choice(("kv_head",)), "Each KV head has a set")

    @property
    def per_kv_head(self) -> bool:
        """Always."""
        return True
