"""Penalties for what a request has answered, at each place of a run.

SGLang counts a request's answered tokens on the host, between steps. A run of drafts needs them at each of its places,
and the overlap scheduler starts a round before the host knows what the round before has answered. So the counts live on
the device and follow each round there.

A place sees all tokens that were answered before it, as ordinary decoding does with `--disable-overlap-schedule`. With
the overlap scheduler, ordinary decoding of SGLang counts each token one step late, and begins with the last token of
the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

NOBODY = 0
"""The entry of all requests without penalties. Its parameters change nothing."""


@dataclass(frozen=True)
class PenaltyTable:
    """Parameters and counts of each request that has penalties, by its entry; E entries."""

    counts: Tensor
    """int32 [E, V], how often each token was answered, without the last one."""
    scales: Tensor
    """float32 [E, 3], frequency, presence and repetition penalty."""
    lengths: Tensor
    """int64 [E, 2], tokens of the prompt, and fewest tokens of the answer."""
    stops: Tensor
    """int64 [E, S], tokens that may not come before these, V where there are no more."""

    def grown(self, entries: int, stops: int) -> "PenaltyTable":
        """The same with room for so many entries and stop tokens a request."""
        more, vocab = entries - len(self.counts), self.counts.shape[1]
        pad = torch.nn.functional.pad
        return PenaltyTable(
            pad(self.counts, (0, 0, 0, more)),
            pad(self.scales, (0, 0, 0, more)),
            pad(self.lengths, (0, 0, 0, more)),
            pad(self.stops, (0, stops - self.stops.shape[1], 0, more), value=vocab),
        )


@dataclass(frozen=True)
class RunPenalties:
    """Penalties of the B rows of one round."""

    table: PenaltyTable
    entries: Tensor  # int64 [B]
    bonus: Tensor  # int64 [B], the token before the first place: answered, but not in the counts
    lens: Tensor  # int64 [B], tokens with KV, which are all before `bonus`

    def apply(self, logits: Tensor, drafts: Tensor, first: int) -> None:
        """Change logits [B, n, V] of the places from `first` on in place; `drafts` int64 [B, first + n - 1]."""
        run = torch.cat([self.bonus[:, None], drafts], dim=1)
        counts = self.table.counts[self.entries]
        one = torch.ones_like(run[:, :1], dtype=counts.dtype)
        for place in range(run.shape[1]):
            counts.scatter_add_(1, run[:, place : place + 1], one)
            if place >= first:
                self._apply_at(logits[:, place - first], counts, place)

    def _apply_at(self, logits: Tensor, counts: Tensor, place: int) -> None:
        frequency, presence, repetition = self.table.scales[self.entries, :, None].unbind(1)
        seen = counts > 0
        logits -= frequency * counts + presence * seen
        self._forbid_stops(logits, place)
        scale = torch.where(seen, repetition, 1.0)
        logits.copy_(torch.where(logits < 0, logits * scale, logits / scale))

    def _forbid_stops(self, logits: Tensor, place: int) -> None:
        """As SGLang does, add -inf to what ends an answer that is too short."""
        prompt, fewest = self.table.lengths[self.entries].unbind(1)
        stops = self.table.stops[self.entries]
        forbidden = (self.lens + 1 + place - prompt < fewest)[:, None] & (stops < logits.shape[1])
        addend = torch.zeros_like(stops, dtype=logits.dtype).masked_fill_(forbidden, float("-inf"))
        logits.scatter_add_(1, stops.clamp_max(logits.shape[1] - 1), addend)

    def learn(self, drafts: Tensor, accept_lens: Tensor) -> None:
        """Count what a round has answered: `drafts` int64 [B, k], `accept_lens` int32 [B] of `Accepted`."""
        run = torch.cat([self.bonus[:, None], drafts], dim=1)
        places = torch.arange(run.shape[1], device=run.device)
        counted = (places < accept_lens[:, None]) & (self.entries != NOBODY)[:, None]
        counts = self.table.counts
        at = self.entries[:, None] * counts.shape[1] + run
        counts.view(-1).scatter_add_(0, at.flatten(), counted.flatten().to(counts.dtype))


class PenaltyMemory:
    """Which requests have penalties, and their table. All requests of a server's decode batches must pass through it.

    Args:
        vocab: width of the logits.
        device: of the logits.
    """

    def __init__(self, vocab: int, device: torch.device | str) -> None:
        self._vocab, self._device = vocab, device
        self._table: PenaltyTable | None = None
        self._entries: dict[Any, int] = {}
        self._answered: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._rows: tuple[list[int], Tensor] | None = None

    def prefill(self, reqs: Sequence[Any]) -> None:
        """Note requests whose prompt is run. One that was retracted begins anew, with what it had answered by then."""
        for req in reqs:
            self._entries.pop(req, None)
            if _has_penalties(req.sampling_params):
                self._answered[req] = len(req.output_ids)

    def of(self, reqs: Sequence[Any], bonus: Tensor, lens: Tensor) -> RunPenalties | None:
        """Penalties of a decode round's requests; None if none has any. Arguments as the fields."""
        wanted = [req for req in reqs if _has_penalties(req.sampling_params)]
        # A running request is in every decode batch, so others are gone, or come back by a prefill.
        self._entries = {req: self._entries[req] for req in wanted if req in self._entries}
        if not wanted:
            return None
        for req in wanted:
            if req not in self._entries:
                self._admit(req)
        entries = [self._entries.get(req, NOBODY) for req in reqs]
        if self._rows is None or self._rows[0] != entries:
            self._rows = entries, self._there(entries)
        assert self._table is not None
        return RunPenalties(self._table, self._rows[1], bonus, lens.long())

    def _admit(self, req: Any) -> None:
        """Give a request an entry, with the tokens that it had answered before its prompt was run."""
        if req not in self._answered:
            raise RuntimeError(
                f"request {req.rid} decodes without a prefill that was seen here, and penalties need one"
            )
        params, stops = req.sampling_params, _stops_of(req, self._vocab)
        table, entry = self._room_for(len(stops)), self._free_entry()
        answered = self._there(list(req.output_ids[: self._answered[req]]))
        table.counts[entry].zero_().scatter_add_(0, answered, torch.ones_like(answered, dtype=torch.int32))
        scales = [params.frequency_penalty, params.presence_penalty, params.repetition_penalty]
        table.scales[entry] = self._there(scales, torch.float32)
        table.lengths[entry] = self._there([len(req.origin_input_ids), params.min_new_tokens])
        table.stops[entry] = self._vocab
        table.stops[entry, : len(stops)] = self._there(stops)
        self._entries[req] = entry

    def _there(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Values on the device, without a wait for the rounds that run there."""
        on_host = torch.tensor(values, dtype=dtype, pin_memory=torch.device(self._device).type == "cuda")
        return on_host.to(self._device, non_blocking=True)

    def _free_entry(self) -> int:
        return min(set(range(1, len(self._entries) + 2)) - set(self._entries.values()))

    def _room_for(self, stops: int) -> PenaltyTable:
        """The table, with an entry to spare and so many stop tokens a request."""
        if self._table is None:
            self._table = PenaltyTable(
                torch.zeros(1, self._vocab, dtype=torch.int32, device=self._device),
                torch.tensor([[0.0, 0.0, 1.0]], device=self._device),
                torch.zeros(1, 2, dtype=torch.int64, device=self._device),
                torch.full((1, 1), self._vocab, dtype=torch.int64, device=self._device),
            )
        have, width = self._table.stops.shape
        needed = len(self._entries) + 2
        if needed > have or stops > width:
            self._table = self._table.grown(max(have, 2 * needed) if needed > have else have, max(width, stops))
        return self._table


def _has_penalties(params: Any) -> bool:
    """Whether SGLang's `SamplingParams` penalise what was answered, or its length."""
    counts = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0 or params.repetition_penalty != 1.0
    return counts or params.min_new_tokens > 0


class _OneRequest:
    """What SGLang's penalizer asks of its orchestrator."""

    device = "cpu"

    def __init__(self, req: Any, vocab: int) -> None:
        self.reqs = lambda: [req]
        self.vocab_size = vocab


def _stops_of(req: Any, vocab: int) -> list[int]:
    """Tokens that `min_new_tokens` forbids, by SGLang's own rule, which differs by release."""
    if req.sampling_params.min_new_tokens <= 0:
        return []
    from sglang.srt.sampling.penaltylib import BatchedMinNewTokensPenalizer

    request = _OneRequest(req, vocab)
    penalizer = BatchedMinNewTokensPenalizer(request)
    penalizer.prepare()
    return penalizer.stop_token_penalties[0].isinf().nonzero()[:, 0].tolist()
