"""Closed layers: in a part of training, random layers see sinks and recent tokens only, behind a random place.

The rows before that place see everything, as a server's prefill; those behind stand for decode steps. A model trained
so learns to retrieve in any of the layers that are left open, so that what one layer selects is what others want.
"""

import math
import random

import torch
from small_qwen3.masks import Rule, build_mask
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

SINKS = 4
FIRST_CLOSABLE = 2  # layers below are dense in sparse decode
WINDOWS = (32, 512)  # recent tokens that a closed row sees
PROMPT_SHARE = 0.75  # of a row at most sees everything in closed layers too


class ClosedMask:
    """The mask of closed layers, drawn anew by `draw`; its buffers stay, so that compiled layers do too."""

    mask: BlockMask | Tensor

    def __init__(self, length: int, device: torch.device) -> None:
        self.length, self.device = length, device
        self._visible_after = torch.zeros(length, dtype=torch.int32, device=device)
        self._anchor = torch.zeros(length, dtype=torch.bool, device=device)
        self._rule = self._make_rule()

    def draw(self, rng: random.Random) -> None:
        """Draw the window, the place from which rows are closed, and in 3 of 10 cases tokens that all rows see."""
        low, high = (math.log(min(w, self.length // 4)) for w in WINDOWS)
        keep = rng.uniform(0.02, 0.15) if rng.random() < 0.3 else 0.0
        self.set(
            window=round(math.exp(rng.uniform(low, high))),
            closed_from=rng.randrange(round(PROMPT_SHARE * self.length)),
            kept=torch.tensor(sorted(rng.sample(range(self.length), round(keep * self.length))), dtype=torch.long),
        )

    def set(self, *, window: int, closed_from: int, kept: Tensor) -> None:
        """Rows from `closed_from` on see `SINKS` sinks, the `kept` positions and the last `window` tokens."""
        row = torch.arange(self.length, device=self.device, dtype=torch.int32)
        self._visible_after.copy_(torch.where(row >= closed_from, row - window, -1))
        self._anchor.copy_(row < SINKS)
        self._anchor[kept.to(self.device)] = True
        self.mask = build_mask(self._rule, self.length, self.device)

    def _make_rule(self) -> Rule:
        after, anchor = self._visible_after, self._anchor

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((k > after[q]) | anchor[k])

        return visible


def draw_open_layers(rng: random.Random, layers: int) -> frozenset[int]:
    """Which layers see everything in one batch: all in 4 of 10, else 1 to 5 of those that decode sparsely.

    The layers that are always dense in sparse decode open in half of those batches only: a model that retrieved there
    alone would make every method look right.
    """
    if rng.random() < 0.4:
        return frozenset(range(layers))
    closable = range(FIRST_CLOSABLE, layers)
    low = range(FIRST_CLOSABLE) if rng.random() < 0.5 else ()
    return frozenset((*low, *rng.sample(closable, rng.randint(1, min(5, len(closable))))))
