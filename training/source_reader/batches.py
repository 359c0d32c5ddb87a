"""Batches on the device: windows of text and chain rows, in an order that the seed and the count of rows decide."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .tokenizer import BOS

IGNORE = -100


class TextRows:
    """Windows of one long token array; every window once before any comes again, from another phase each time.

    A row is `<bos>` and `length - 1` tokens of the window; its targets are the window's `length`.
    """

    def __init__(self, tokens: Tensor, *, length: int, seed: int) -> None:
        """`tokens`: int16 [N] on the device; vocabularies stay below 32,768."""
        if len(tokens) < 2 * length:
            raise ValueError(f"rows of {length} tokens need {2 * length} tokens of text, got {len(tokens)}")
        self._tokens, self._length, self._seed = tokens, length, seed
        self._windows = len(tokens) // length - 1
        self._epoch = -1

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows `first`, …, as tokens and targets, int64 [count, length]."""
        starts = torch.tensor([self._start(i) for i in range(first, first + count)], device=self._tokens.device)
        window = torch.arange(self._length, device=self._tokens.device)
        targets = self._tokens[starts[:, None] + window].long()
        return torch.cat((torch.full_like(targets[:, :1], BOS), targets[:, :-1]), dim=1), targets

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self._windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._phase = epoch, int(rng.integers(self._length))
            self._order = rng.permutation(self._windows)
        return int(self._order[place]) * self._length + self._phase


class ChainRows:
    """Prepared chain rows, in order and again."""

    def __init__(self, folder: Path, length: int, device: torch.device) -> None:
        rows = np.load(folder / f"chains-{length}.npy")
        self._tokens = torch.from_numpy(rows.astype(np.int16)).to(device)
        self._wanted = torch.from_numpy(np.load(folder / f"wanted-{length}.npy")).to(device)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows `first`, …, as tokens and targets, int64 [count, length]; `IGNORE` where nothing can be foretold."""
        place = torch.arange(first, first + count, device=self._tokens.device) % len(self._tokens)
        tokens = self._tokens[place].long()
        return tokens[:, :-1], tokens[:, 1:].masked_fill(~self._wanted[place, 1:], IGNORE)


class Mixture:
    """Batches of both kinds of row at one length."""

    def __init__(self, text: TextRows, chains: ChainRows, *, rows: int, chain_share: float) -> None:
        self._text, self._chains = text, chains
        self._of_chains = round(rows * chain_share)
        self._of_text = rows - self._of_chains

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index`: tokens and targets, int64 [rows, length]."""
        parts = [self._text.rows(index * self._of_text, self._of_text)]
        if self._of_chains:
            parts.append(self._chains.rows(index * self._of_chains, self._of_chains))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def load_text(file: Path, device: torch.device) -> Tensor:
    """A token array as int16 on the device."""
    return torch.from_numpy(np.load(file).astype(np.int16)).to(device)
