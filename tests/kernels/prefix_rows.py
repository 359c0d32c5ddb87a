"""Rows of KV slots as a radix tree hands them out: one slot for each different prefix."""

import random

import torch
from torch import Tensor


def prefix_rows(batch: int, width: int, *, segment: int, seed: int, alphabet: int = 2) -> tuple[Tensor, Tensor]:
    """Slots int32 [batch, width] and lengths int32 [batch] of random rows that branch every `segment` tokens.

    Each row's last token is its own, as in a decode step. What lies behind it are slots of other rows, or padding.
    """
    draw = random.Random(seed)
    slot_of: dict[tuple, int] = {}
    rows, lens = [], []
    for row in range(batch):
        choices = [draw.randrange(alphabet) for _ in range(width // segment + 1)]
        length = draw.randint(1, width)
        tokens = [(place // segment, choices[place // segment]) for place in range(length - 1)] + [("own", row)]
        path, slots = (), []
        for token in tokens:
            path = hash((path, token))
            slots.append(slot_of.setdefault(path, len(slot_of) + 1))
        rows.append(slots)
        lens.append(length)
    behind = [draw.choice([0, 1, len(slot_of)]) for _ in range(batch)]
    padded = [slots + [rest] * (width - len(slots)) for slots, rest in zip(rows, behind, strict=True)]
    return torch.tensor(padded, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)


def shared_by_comparison(slots: Tensor, seq_lens: Tensor, granule: int) -> Tensor:
    """int64 [B, B], leading slots that two rows share, last tokens aside, in multiples of `granule`: token by token."""
    length = torch.minimum(seq_lens.unsqueeze(0), seq_lens.unsqueeze(1)).long() - 1
    inside = torch.arange(slots.shape[1]) < length.unsqueeze(2)
    equal = (slots.unsqueeze(0) == slots.unsqueeze(1)) & (slots != 0).unsqueeze(0) & inside
    return equal.long().cumprod(2).sum(2).fill_diagonal_(0) // granule * granule
