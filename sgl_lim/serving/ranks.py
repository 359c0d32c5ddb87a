"""What the ranks of a tensor-parallel group tell one another so that all of them choose one set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16
_ENTRY_BYTES = 8
"""Of a token that is told of: its position and its score."""
WHOLE_BYTES = 4 << 20
"""Where a rank receives no more, rows are told whole: more launches would take longer than these bytes."""


@dataclass(frozen=True)
class RankExchange:
    """Combines scores over the ranks that must choose one set. Calling it, whole rows are combined: `CombineRanks`.

    Attributes:
        group: SGLang's coordinator of all attention-TP ranks.
        first: rank of the group that is the first of those that choose one set.
        together: how many they are, in a row.
    """

    group: Any
    first: int
    together: int

    def __call__(self, scores: Tensor, how: str) -> Tensor:
        """Whole rows of scores float32, of one shape on all ranks, combined by "max" or "logsumexp"."""
        group, others = self.group, self.together - 1
        # Two ranks would receive as much in slices.
        if scores.is_cuda and group.world_size == self.together > 2 and scores.nbytes * others > WHOLE_BYTES:
            return self._in_slices(scores, how)
        gathered = group.all_gather(scores.contiguous(), dim=0).view(group.world_size, *scores.shape)
        return _reduce(gathered[self.first : self.first + self.together], how)

    def pays(self, rows: int, width: int, budget: int) -> bool:
        """Whether the best `budget` tokens of rows are told sooner than rows of so many scores."""
        received = 4 * rows * width * (self.together - 1)
        return received > WHOLE_BYTES and _ENTRY_BYTES * budget < 4 * width

    def best(self, scores: Tensor, positions: Tensor) -> None:
        """Let each rank learn the best scores of the others; its own are kept where they are larger.

        Args:
            scores: float32 [B, L] or [B, H_kv, L]; written. What ranks choose by them is one set, if scores combine by
                maximum: `Method.best_suffice` says why. They differ among ranks in tokens that nobody chooses.
            positions: int32 [B, K] or [B, H_kv, K], what this rank would choose by its own scores. What is no position
                counts as the first one.
        """
        group, places = self.group, positions.clamp(min=0)
        mine = torch.stack((places, scores.gather(-1, places.long()).view(torch.int32)))
        told = group.all_gather(mine, dim=0).view(group.world_size, *mine.shape)
        told = told[self.first : self.first + self.together]
        # [B, together * K]
        theirs, values = (told[:, part].movedim(0, -2).flatten(-2) for part in range(2))
        scores.scatter_reduce_(-1, theirs.long(), values.view(torch.float32), reduce="amax")

    def _in_slices(self, scores: Tensor, how: str) -> Tensor:
        """Each rank combines a part of the places and tells the others: of eight ranks each receives a quarter so.

        The result is that of combining whole rows to the bit, and the same on all ranks.
        """
        number, width = self.group.world_size, scores.shape[-1]
        lines = scores.reshape(-1, width)
        part = -(-width // (number * _ALIGNED)) * _ALIGNED
        padded = torch.nn.functional.pad(lines, (0, number * part - width))
        # [ranks, lines, part]
        given = padded.unflatten(1, (number, part)).transpose(0, 1).contiguous()
        taken = torch.empty_like(given)
        self.group.all_to_all_single(taken, given)
        combined = self.group.all_gather(_reduce(taken, how), dim=0).view(number, len(lines), part)
        return combined.transpose(0, 1).flatten(1)[:, :width].unflatten(0, scores.shape[:-1])


def _reduce(ranks: Tensor, how: str) -> Tensor:
    """The scores of ranks [ranks, …] in one."""
    return ranks.logsumexp(dim=0) if how == "logsumexp" else ranks.amax(dim=0)
