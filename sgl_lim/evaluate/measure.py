"""Decodes the items of a suite under every choice and makes a row of figures of each."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_lim.evaluate.checkpoint import Checkpoint, Decoded
from sgl_lim.evaluate.choices import FULL, ROUNDING, Choice
from sgl_lim.evaluate.items import DEPTHS, Item, Suite
from sgl_lim.programs.intervals import Interval, clustered_interval, wilson_interval

_CHUNK = 64
"""Distributions over a vocabulary that are compared at once."""


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, interval: Interval | None) -> "Share":
        """Without an interval it has no width."""
        return cls(value, *(interval or (value, value)))


@dataclass(frozen=True)
class Row:
    """Figures of one choice on one suite."""

    suite: str
    task: str
    choice: Choice
    items: int
    tokens: int
    """Scored tokens."""
    agreement: Share
    """Tokens whose argmax is that of full attention."""
    perplexity: float
    overlap: float
    """Sum of min(p, q) over the vocabulary, with q of full attention; mean over scored tokens."""
    whole: Share
    """Items all of whose scored tokens are the argmax."""
    right: float
    """Scored tokens that are the argmax."""
    by_depth: dict[int, float]
    """`whole` by the depth of the hidden fact, in percent; empty where nothing is hidden."""
    attended: float
    """Share of their context that sparse layers read."""
    attended_tokens: float
    """Tokens that a layer reads, mean over all layers."""
    attended_fraction: float
    """Of the tokens that full attention reads."""
    seconds: float


@dataclass
class _Tally:
    """What the items of a suite gave under one choice; one entry an item."""

    agreed: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    seconds: float = 0.0


def measure(
    checkpoint: Checkpoint, suite: Suite, choices: Sequence[Choice], *, rows: int, done: Callable[[int], None]
) -> list[Row]:
    """A row a choice, full attention's first; each item's prompt is prefilled once.

    Args:
        rows: decode steps at once.
        done: is told how many tokens were decoded, as they are.
    """
    choices = measured(checkpoint, choices)
    tallies = [_Tally() for _ in choices]
    for item in suite.items:
        prompt, dense = checkpoint.prefill(item.prompt), None
        for choice, tally in zip(choices, tallies, strict=True):
            begin = time.monotonic()
            if choice == ROUNDING:
                found = _in_one_pass(checkpoint, item)
            else:
                found = checkpoint.decode(prompt, item.fed, choice.method, rows=rows)
            logits = torch.cat((prompt.logits, found.logits))[item.scored_from :]
            dense = logits if dense is None else dense
            _add(tally, item, found, logits, dense)
            tally.seconds += time.monotonic() - begin
            done(len(item.fed))
    return [_row(suite, choice, tally) for choice, tally in zip(choices, tallies, strict=True)]


def measured(checkpoint: Checkpoint, choices: Sequence[Choice]) -> list[Choice]:
    """The choices behind full attention, and behind full attention again where rounding changes tokens."""
    return [FULL, *[ROUNDING] * checkpoint.rounds, *(choice for choice in choices if choice not in (FULL, ROUNDING))]


def _in_one_pass(checkpoint: Checkpoint, item: Item) -> Decoded:
    """All steps of an item as transformers' own dense pass."""
    fed = item.fed
    logits = checkpoint.prefill([*item.prompt, *fed], keep=len(fed)).logits
    lens = torch.arange(len(item.prompt) + 1, len(item.prompt) + len(fed) + 1, device=logits.device)
    return Decoded(logits, torch.ones_like(lens, dtype=torch.float32), lens.float())


def _add(tally: _Tally, item: Item, found: Decoded, logits: Tensor, dense: Tensor) -> None:
    """One item's figures. Logits [S, vocab] are those of scored tokens."""
    targets = torch.tensor(item.right[item.scored_from :], device=logits.device)
    if item.ends:
        targets = torch.cat((targets, dense[-1:].argmax(-1)))
    best = logits.argmax(-1)
    hits = best == targets
    tally.agreed.append((best == dense.argmax(-1)).float().mean().item())
    tally.losses.append(F.cross_entropy(logits, targets).item())
    tally.overlaps.append(overlap(logits, dense).mean().item())
    tally.right.append(hits.float().mean().item())
    tally.whole.append(float(hits.all()))
    tally.attended.append(found.attended.mean().item())
    tally.read.append(found.read.mean().item())


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Sum of min(p, q) of the distributions of two logits [S, vocab], float32 [S]."""
    parts = zip(one.split(_CHUNK), other.split(_CHUNK), strict=True)
    return torch.cat([torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1) for a, b in parts])


def _row(suite: Suite, choice: Choice, tally: _Tally) -> Row:
    sizes = [len(item.right) + item.ends - item.scored_from for item in suite.items]
    contexts = [len(item.prompt) + (len(item.fed) + 1) / 2 for item in suite.items]
    read = statistics.fmean(tally.read)
    whole = statistics.fmean(tally.whole)
    loss = sum(loss * size for loss, size in zip(tally.losses, sizes, strict=True)) / sum(sizes)
    # Tokens of one item are not independent, so they count for as many as their items' spread says.
    agreed = None if choice == FULL else clustered_interval(tally.agreed, round(statistics.fmean(sizes)))
    return Row(
        suite=suite.name,
        task=suite.task,
        choice=choice,
        items=len(suite.items),
        tokens=sum(sizes),
        agreement=Share.of(statistics.fmean(tally.agreed), agreed),
        perplexity=math.exp(loss),
        overlap=statistics.fmean(tally.overlaps),
        whole=Share.of(whole, wilson_interval(whole, len(suite.items))),
        right=statistics.fmean(tally.right),
        by_depth=_by_depth(suite, tally),
        attended=statistics.fmean(tally.attended),
        attended_tokens=read,
        attended_fraction=read / statistics.fmean(contexts),
        seconds=tally.seconds,
    )


def _by_depth(suite: Suite, tally: _Tally) -> dict[int, float]:
    found = {}
    for depth in DEPTHS:
        whole = [right for item, right in zip(suite.items, tally.whole, strict=True) if item.depth == depth]
        if whole:
            found[depth] = statistics.fmean(whole)
    return found
