"""Decodes items under full attention and under candidates, all items of a part together, and compares what comes out.

The prompts of a part lie in one pool, so a candidate costs one pass over the tokens behind them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels.page_bounds import PAGE
from sgl_lim.evaluate.checkpoint import Checkpoint, Prompt, shared_tokens
from sgl_lim.evaluate.items import Item, Suite
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.step_rows import Rows
from sgl_lim.methods import Full, Method

_PROMPT_TOKENS = 3
"""Tokens of a prompt that cost as much as one decoded token."""
_AS_FULL = -1
"""In place of a right token: the one that full attention says."""


@dataclass(frozen=True)
class ItemScore:
    """What one item gave; divergence and agreement are sums over the tokens that count."""

    suite: str
    task: str
    tokens: int
    """Scored ones whose context is longer than the budget: within it everything is dense."""
    divergence: float
    """Sum of KL(full attention || candidate), in nats."""
    agreed: float
    """Tokens whose most probable one is that of full attention."""
    whole: bool
    """Whether every right token is the most probable one."""
    log_probability: float
    """Sum over all right tokens, in nats."""


@dataclass(frozen=True)
class _Batch:
    """Rows of one pass, and those of them that are scored."""

    rows: Rows
    scored: Tensor  # int64 [n]: rows
    items: Tensor  # int64 [n]: the item of each
    right: Tensor  # int64 [n]: the token that should follow
    full: Tensor  # float32 [n, vocab]: log-probabilities under full attention


class Part:
    """Items whose prompts are in one pool on the model's device."""

    def __init__(
        self, checkpoint: Checkpoint, suites: Sequence[Suite], *, rows: int, done: Callable[[int], None]
    ) -> None:
        """Prefill the prompts and decode densely.

        Args:
            rows: decode steps at once; done: is told how many tokens ran, as they did.
        """
        self._checkpoint, self._done = checkpoint, done
        self._items = [(suite, item) for suite in suites for item in suite.items]
        fed: list[tuple[Prompt, list[int]]] = []
        room = _slots([item for _, item in self._items])
        for _, item in self._items:
            prompt = checkpoint.prefill(item.prompt, beside=fed[-1][0] if fed else None, room=room)
            fed.append((prompt, item.fed))
            done(prompt_work(item))
        self.pool: Pool = fed[0][0].pool
        self._batches = [self._batch(*of) for of in _scored(checkpoint.rows_behind(fed, rows=rows), self._items)]
        self.full = self._scores([_compared(batch.full, batch, 0) for batch in self._batches])
        """What each item gives under full attention."""

    @property
    def rows(self) -> list[Rows]:
        """Of each pass, in order."""
        return [batch.rows for batch in self._batches]

    def score(self, method: Method) -> list[ItemScore]:
        """What each item gives under a method."""
        found = []
        for batch in self._batches:
            logits = self._checkpoint.step(self.pool, batch.rows, method).logits
            found.append(_compared(logits[batch.scored], batch, method.budget))
            self._done(len(batch.rows.ids))
        return self._scores(found)

    def _scores(self, compared: Sequence[Tensor]) -> list[ItemScore]:
        """Sums by item of what the batches gave, each [n, 5]."""
        sums = torch.zeros(len(self._items), 5, dtype=torch.float64, device=compared[0].device)
        for batch, figures in zip(self._batches, compared, strict=True):
            sums.index_add_(0, batch.items, figures.double())
        found = []
        for (suite, item), (tokens, divergence, agreed, hits, sure) in zip(self._items, sums.tolist(), strict=True):
            whole = hits == len(item.right) + item.ends - _first(item)
            found.append(ItemScore(suite.name, suite.task, int(tokens), divergence, agreed, whole, sure))
        return found

    def _batch(self, rows: Rows, places: list[tuple[int, int, int]]) -> _Batch:
        device = rows.ids.device
        scored, items, right = torch.tensor(places, dtype=torch.int64, device=device).reshape(-1, 3).unbind(1)
        full = self._checkpoint.step(self.pool, rows, Full()).logits[scored].log_softmax(-1)
        self._done(len(rows.ids))
        right = torch.where(right == _AS_FULL, full.argmax(-1), right)
        return _Batch(rows, scored, items, right, full)


def prompt_work(item: Item) -> int:
    """What a prompt costs, in decoded tokens: those of a prompt run together."""
    return len(item.prompt) // _PROMPT_TOKENS


def work(suites: Sequence[Suite]) -> tuple[int, int]:
    """What the prompts of suites cost, and what a pass over the tokens behind them does, in decoded tokens.

    Prompts that begin alike are counted as if each ran whole.
    """
    items = [item for suite in suites for item in suite.items]
    return sum(map(prompt_work, items)), sum(len(item.fed) for item in items)


def _slots(items: Sequence[Item]) -> int:
    """Slots that items take, at most: prompts that begin alike share theirs."""
    before: Sequence[int] = ()
    total = 0
    for item in items:
        total += len(item) - shared_tokens(before, item.prompt, len(item.prompt)) + 2 * PAGE
        before = item.prompt
    return total


def _first(item: Item) -> int:
    """Place of the first token of an item that a decode step predicts and that counts."""
    return max(1, item.scored_from)


def _scored(
    batches: Sequence[Rows], items: Sequence[tuple[Suite, Item]]
) -> list[tuple[Rows, list[tuple[int, int, int]]]]:
    """Each batch with row, item and right token of what counts in it."""
    places = [
        (number, right, place >= _first(item))
        for number, (_, item) in enumerate(items)
        for place, right in enumerate([*item.right, _AS_FULL][1 : len(item.fed) + 1], start=1)
    ]
    found, begin = [], 0
    for rows in batches:
        part = places[begin : begin + len(rows.ids)]
        found.append((rows, [(row, number, right) for row, (number, right, counts) in enumerate(part) if counts]))
        begin += len(part)
    return found


def _compared(logits: Tensor, batch: _Batch, budget: int) -> Tensor:
    """float32 [n, 5]: counts, and of what counts KL divergence and agreement; right, and its log-probability."""
    found = logits.log_softmax(-1)
    counts = batch.rows.lens[batch.scored] > budget
    divergence = (batch.full.exp() * (batch.full - found)).sum(-1) * counts
    best = found.argmax(-1)
    agreed = (best == batch.full.argmax(-1)) & counts
    sure = found.gather(1, batch.right.unsqueeze(1)).squeeze(1)
    return torch.stack((counts.float(), divergence, agreed.float(), (best == batch.right).float(), sure), dim=1)
