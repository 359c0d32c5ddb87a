"""How many drafts a dense verification would accept: rounds of a lossless server over texts that are known.

A round drafts k tokens behind the last one that is decided, and one dense pass verifies them. A draft is accepted with
the probability sum(min(p, q)), where q is what its own step says and p what full attention says at the same place; the
first one that is not ends the round. Which tokens were accepted is drawn, so that sets are as old as on a server. The
text stands for what full attention would have said: it goes on with its own token where a draft is rejected.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lim_kernels import Scaling
from sgl_lim.evaluate.checkpoint import Checkpoint, Prompt, table_width
from sgl_lim.evaluate.measure import overlap
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.step_rows import Rows, StepRows
from sgl_lim.methods import HeadsOfRank, Method, Role
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.draft_sets import DraftSets, plan_drafts
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Read
from sgl_lim.serving.verification import plan_guide


@dataclass(frozen=True)
class Way:
    """How drafts know what to attend to."""

    name: str
    queries: tuple[str, ...] = ()
    """Whose queries choose the sets: of the verification before, those of the "first" token, which is always kept, or
    of the "last", which need not be; or of the last token that was "accepted". None: each step selects for itself."""
    every_layer: bool = False
    """Whether each layer has a set of its own, rather than that of the last selection layer."""


WAYS = (
    Way("unguided"),
    Way("first", ("first",)),
    Way("last", ("last",)),
    Way("first+last", ("first", "last")),
    Way("accepted", ("accepted",)),
    Way("first", ("first",), every_layer=True),
    Way("accepted", ("accepted",), every_layer=True),
)


class KnownText:
    """A text whose tokens all went through a dense pass, which left their keys, values and last queries.

    Args:
        start: the first token whose distribution and queries are kept.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Sequence[int], start: int, beside: "KnownText | None") -> None:
        self.start, self.tokens = start, torch.tensor(tokens, device=checkpoint.model.device)
        self.queries: dict[int, Tensor] = {}
        """[L - start, H, D] by layer."""
        self.scales: dict[int, float] = {}
        kept = len(tokens) - start

        def note(layer: int, q: Tensor, scale: float) -> None:
            self.queries[layer], self.scales[layer] = q[0, :, -kept:].transpose(0, 1).contiguous(), scale

        prompt = None if beside is None else beside.prompt
        self.prompt: Prompt = checkpoint.prefill(tokens, keep=kept, beside=prompt, note=note)
        self.logits = self.prompt.logits
        """float32 [L - start, vocab], of the token behind each one."""


class Rounds:
    """Rounds over texts of one pool, by one method and way of drafting.

    Args:
        drafts: of a round.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[KnownText], method: Method, way: Way, drafts: int):
        self._checkpoint, self._texts, self._way, self._drafts = checkpoint, list(texts), way, drafts
        if way.every_layer:
            method = replace(method, selection_layers=tuple(range(checkpoint.depth)))  # type: ignore[call-arg]
        self._decode = LayerDecode(method, HeadsOfRank(0, checkpoint.heads, checkpoint.heads))
        self._roles = method.layer_roles(checkpoint.depth)
        self._pool, device = texts[0].prompt.pool, checkpoint.model.device
        self._slots = self._pool.take(len(texts) * drafts, device).view(len(texts), drafts).int()
        self._sets: DraftSets | None = None
        if way.queries:
            assert isinstance(method, Ranked)
            heads = self._pool.of_layer(0)[0].shape[1]
            rows = len(texts) + 1
            self._sets = DraftSets(method, self._roles, drafts + 1, num_rows=rows, kv_heads=heads, device=device)

    def run(self, which: Sequence[int], lens: Sequence[int], before: Sequence[int]) -> Tensor:
        """Acceptance of the drafts of one round, float32 [n, drafts].

        Args:
            which: texts, by place.
            lens: tokens of each before the one that is drafted from; before: the same in the round before.
        """
        table = self._table(which, lens)
        if self._sets is not None:
            self._guide(table, which, lens, before)
        rows = self._rows(table, which, lens)
        found = self._checkpoint.run(rows, self._attention(rows, which))
        places = [
            self._texts[n].logits[at - self._texts[n].start :][: self._drafts] for n, at in self._each(which, lens)
        ]
        return overlap(found, torch.cat(places)).view(len(which), self._drafts)

    def _each(self, which: Sequence[int], lens: Sequence[int]) -> list[tuple[int, int]]:
        return list(zip(which, lens, strict=True))

    def _table(self, which: Sequence[int], lens: Sequence[int]) -> Tensor:
        """int32 [n, W]: the texts' slots, and those of drafts behind them."""
        width = table_width(max(lens) + self._drafts)
        table = torch.zeros(len(which), width, dtype=torch.int32, device=self._slots.device)
        for row, (n, length) in enumerate(self._each(which, lens)):
            table[row, :length] = self._texts[n].prompt.slots[:length].int()
            table[row, length : length + self._drafts] = self._slots[n]
        return table

    def _rows(self, table: Tensor, which: Sequence[int], lens: Sequence[int]) -> Rows:
        """The tokens that are drafted from, each a row; those behind the first stand for accepted drafts."""
        ids = [self._texts[n].tokens[length : length + self._drafts] for n, length in self._each(which, lens)]
        each = torch.arange(1, self._drafts + 1, dtype=torch.int32, device=table.device)
        first = torch.tensor(list(lens), dtype=torch.int32, device=table.device)
        by_draft = table.repeat_interleave(self._drafts, dim=0)
        return Rows(torch.cat(ids), by_draft, (first.unsqueeze(1) + each).flatten())

    def _attention(self, rows: Rows, which: Sequence[int]) -> "StepRows | DraftRows":
        method, checkpoint = self._decode.method, self._checkpoint
        if self._sets is None:
            return StepRows(method, self._pool, rows, heads=checkpoint.heads, depth=checkpoint.depth)
        of_sets = torch.tensor(list(which), device=rows.slots.device).repeat_interleave(self._drafts) + 1
        return DraftRows(self._decode, self._sets, self._pool, rows, of_sets, checkpoint.depth)

    def _guide(self, table: Tensor, which: Sequence[int], lens: Sequence[int], before: Sequence[int]) -> None:
        """Choose the sets of these texts by the queries of the round before."""
        assert self._sets is not None
        at = {
            "first": list(before),
            "last": [length + self._drafts for length in before],
            "accepted": [length - 1 for length in lens],
        }
        # What is chosen has to be there whatever is accepted, so the last token chooses before the first as well.
        known = at["accepted"] if self._way.queries == ("accepted",) else at["first"]
        sizes = torch.tensor(known, dtype=torch.int32, device=table.device) + 1
        plan = plan_guide(self._decode, table, sizes, None)
        if plan is None:
            return
        rows = torch.tensor(list(which), device=table.device) + 1
        self._sets.begin(rows, self._sets.memory.tenants.zero_(), sizes)
        for layer, role in enumerate(self._roles):
            if role is not Role.SELECT:
                continue
            keys, values = self._pool.of_layer(layer)
            scale = Scaling(self._texts[0].scales[layer])
            scores = []
            for name in self._way.queries:
                q = torch.stack(
                    [
                        self._texts[n].queries[layer][one - self._texts[n].start]
                        for n, one in self._each(which, at[name])
                    ]
                )
                scores.append(self._decode.scores(plan, LayerInput(q, keys, values, scale)))
            chosen = self._decode.method.choose(torch.stack(scores).amax(0), sizes, None)
            self._sets.keep(layer, rows, *chosen)


class DraftRows:
    """A pass over drafts, with attention as a server's draft step computes it."""

    def __init__(
        self, decode: LayerDecode, sets: DraftSets, pool: Pool, rows: Rows, of_sets: Tensor, depth: int
    ) -> None:
        """The plan of the step.

        Args:
            of_sets: int64 [R], rows of the sets; depth: layers.
        """
        self._decode, self._pool, self._own = decode, pool, rows.own
        self._roles = decode.method.layer_roles(depth)
        placed, _ = sets.place(of_sets, sets.memory.tenants, rows.slots, rows.lens)
        self._plan = plan_drafts(Read(rows.slots, rows.lens), placed)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Pass`; k and v are the rows' own."""
        self._pool.store(layer, self._own, k, v)
        keys, values = self._pool.of_layer(layer)
        one = LayerInput(q[0].transpose(0, 1).contiguous(), keys, values, Scaling(scale))
        return self._decode.run(self._plan, self._roles[layer], one)[None]


@dataclass(frozen=True)
class Accepted:
    """What the rounds of all texts gave."""

    at: list[float]
    """By place behind the verified token, the probability that a draft is accepted if those before it are."""
    run: list[float]
    """By text, drafts that are accepted in a round, mean."""
    rounds: int


def accepted(rounds: Rounds, spans: Sequence[tuple[int, int]], drafts: int, done: Callable[[int], None]) -> Accepted:
    """Rounds over the texts from the first of these tokens on, as far as all drafts of a round are known.

    Args:
        spans: of each text, the length behind which the first round drafts, and the text's own.
        done: is told how many tokens were decided, as they are.
    """
    draw = random.Random(0)
    lens, before = [start for start, _ in spans], [start - drafts - 1 for start, _ in spans]
    at: list[list[float]] = []
    runs: list[list[float]] = [[] for _ in spans]
    while which := [n for n, (_, end) in enumerate(spans) if lens[n] + drafts < end]:
        found = rounds.run(which, [lens[n] for n in which], [before[n] for n in which]).tolist()
        for n, chances in zip(which, found, strict=True):
            at.append(chances)
            runs[n].append(expected_run(chances))
            count = next((place for place, chance in enumerate(chances) if draw.random() >= chance), drafts)
            before[n], lens[n] = lens[n], lens[n] + count + 1
            done(count + 1)
    means = [sum(column) / len(at) for column in zip(*at, strict=True)]
    return Accepted(means, [sum(run) / len(run) for run in runs], len(at))


def expected_run(chances: Sequence[float]) -> float:
    """Drafts that are accepted, expected, where each is only if those before it are."""
    run, alive = 0.0, 1.0
    for chance in chances:
        alive *= chance
        run += alive
    return run
