"""What `kernels.py` measures with: operands, the timer, baselines, and deviations from the float64 reference."""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lim_kernels import Scaling, SetSizes, choose_tokens, decode_with_scores, score_context, score_tokens
from lim_kernels.select_tokens.reference import candidate_mask

Call = Callable[[], object]
Dense = Callable[["Operands"], list[Callable[[], tuple[Tensor]]]]
"""A baseline of attention: its calls, one a place of the operands; each returns (out [B, H, D],)."""
TopK = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A baseline of `choose_tokens`: scores [B, L], slots [B, L], lens [B] and k to slots [B, k] in any order."""

CACHES = 4
CHECKED_ROWS = 4
SCORE_SLACK = 1e-5
"""Largest difference of a log-weight from the reference's; a set may differ in tokens so close to its last one."""
COPIED_BYTES = 2 << 30
_ROTATED_BYTES = 512 << 20  # several times any L2 cache
_MOST_SLOT_SETS = 16


@dataclass(frozen=True)
class Shape:
    """Heads of a model's attention layer."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of `tokens` tokens."""
        return 2 * tokens * self.kv_heads * self.dim * self.dtype.itemsize

    def slot_sets(self, tokens: int) -> int:
        """How many sets of `tokens` slots calls rotate over, in every cache, so that L2 holds none until its turn."""
        return min(_MOST_SLOT_SETS, -(-_ROTATED_BYTES // (CACHES * self.kv_bytes(tokens))))


@dataclass(frozen=True)
class Operands:
    """One batch of queries and several places that its keys and values are in, all of equal length."""

    q: Tensor  # [B, H, D]
    caches: list[tuple[Tensor, Tensor]]  # keys and values, each [num_slots, H_kv, D]
    slots: list[Tensor]  # int32 [B, L] each, scattered, none twice; never slot 0
    lens: Tensor  # int32 [B], all L

    @property
    def scale(self) -> float:
        """Factor on q·k."""
        return self.q.shape[2] ** -0.5

    def calls(self, op: Callable[..., object], **options: object) -> list[Call]:
        """`op(q, keys, values, slots, lens, scale=…)` on every place, neighbours in different caches."""
        return [
            partial(op, self.q, keys, values, slots, self.lens, scale=self.scale, **options)
            for slots in self.slots
            for keys, values in self.caches
        ]


def attend_and_score(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lens: Tensor, *, scale: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_with_scores` as `Operands.calls` calls an operator."""
    return decode_with_scores(q, keys, values, slots, lens, Scaling(scale), **options)


def score_alone(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lens: Tensor, *, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """`score_context` as `Operands.calls` calls an operator, which leaves the values alone."""
    return score_context(q, keys, slots, lens, Scaling(scale), **options)


@dataclass(frozen=True)
class Selection(SetSizes):
    """Sizes of a set, and the operators of a selection with them."""

    def score(self, logits: Tensor, lens: Tensor, lse: Tensor, *, aggregate: str, implementation: str) -> Tensor:
        """`score_tokens`."""
        return score_tokens(
            logits,
            lens,
            self,
            aggregate=aggregate,
            lse=lse,
            implementation=implementation,
        )

    def choose(
        self, scores: Tensor, lens: Tensor, slots: Tensor | None = None, *, implementation: str
    ) -> tuple[Tensor, Tensor]:
        """`choose_tokens`: positions, or slots if given, and counts."""
        return choose_tokens(
            scores,
            lens,
            self,
            slots=slots,
            implementation=implementation,
        )

    def candidates(self, lens: Tensor, length: int) -> Tensor:
        """bool [B, length]: positions that scores decide about."""
        return candidate_mask(lens, length, recent=self.recent, sinks=self.sinks)


class Pool:
    """KV caches full of normal noise, NaN in the slot that padding names."""

    def __init__(self, shape: Shape, num_slots: int, device: torch.device) -> None:
        self.shape, self.num_slots, self.device = shape, num_slots, device
        self.caches = [(self._cache(), self._cache()) for _ in range(CACHES)]

    def _cache(self) -> Tensor:
        size = (self.num_slots + 1, self.shape.kv_heads, self.shape.dim)
        cache = torch.randn(size, dtype=self.shape.dtype, device=self.device)
        cache[0] = float("nan")
        return cache

    def draw(self, batch: int, tokens: int) -> Operands:
        """Queries and scattered slots for `batch` rows of `tokens` tokens."""
        sets = self.shape.slot_sets(batch * tokens)
        order = torch.randperm(self.num_slots, device=self.device)[: sets * batch * tokens] + 1
        # Clones: each with the alignment of its own allocation.
        slots = [part.clone() for part in order.to(torch.int32).view(sets, batch, tokens)]
        q = torch.randn(batch, self.shape.heads, self.shape.dim, dtype=self.shape.dtype, device=self.device)
        return Operands(q, self.caches, slots, full_lens(batch, tokens, self.device))


def scattered_slots(batch: int, tokens: int, device: torch.device) -> Tensor:
    """int32 [batch, tokens], none twice, never slot 0."""
    order = torch.randperm(batch * tokens, device=device) + 1
    return order.to(torch.int32).view(batch, tokens)


def full_lens(batch: int, tokens: int, device: torch.device) -> Tensor:
    """int32 [batch], all `tokens`."""
    return torch.full((batch,), tokens, dtype=torch.int32, device=device)


def head_logits(batch: int, heads: int, tokens: int, share: float, device: torch.device) -> Tensor:
    """float32 [batch, heads, tokens], deviation 3; `share` is the weight of the noise that all heads have in common."""
    common = torch.randn(batch, 1, tokens, device=device)
    own = torch.randn(batch, heads, tokens, device=device)
    return 3 * (share * common + (1 - share**2) ** 0.5 * own)


class GraphTimer:
    """Microseconds a call on the current CUDA device, from a CUDA graph of many calls."""

    def __init__(self, replays: int, calls: int = 32) -> None:
        self.replays, self.calls = replays, calls

    def __call__(self, variants: Sequence[Call]) -> list[float]:
        """One figure a replay; the calls of a graph rotate over `variants`."""
        for call in variants:
            call()
        torch.cuda.synchronize()
        count = len(variants) * -(-self.calls // len(variants))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                variants[i % len(variants)]()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        # All are queued behind one untimed replay: no interval holds the host's time to launch a graph.
        graph.replay()
        for event in events:
            event.record()
            if event is not events[-1]:
                graph.replay()
        torch.cuda.synchronize()
        times = [1e3 * a.elapsed_time(b) / count for a, b in itertools.pairwise(events)]
        del graph
        self.release()
        return times

    def copy(self) -> list[float]:
        """Microseconds of copies of `COPIED_BYTES`. Not in a graph, which would use a slower copy engine."""
        source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        target.copy_(source)
        times = []
        for _ in range(self.replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        del source, target
        self.release()
        return times

    def release(self) -> None:
        """Give cached memory back; the pool of every graph is its own."""
        gc.collect()
        torch.cuda.empty_cache()


def load_fa3(shape: Shape) -> Dense:
    """FA3 as SGLang's decode step calls it: pages of one token, scheduler metadata once for all layers.

    Raises whatever an import without sgl_kernel or its device raises.
    """
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata, is_fa3_supported

    if shape.dtype == torch.float32 or not is_fa3_supported():
        raise RuntimeError(f"FA3 does not support {shape.dtype} on {torch.cuda.get_device_name()}")

    def prepare(operands: Operands) -> list[Callable[[], tuple[Tensor]]]:
        batch, tokens = operands.slots[0].shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=operands.q.device)
        metadata = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            num_heads=shape.heads,
            num_heads_k=shape.kv_heads,
            headdim=shape.dim,
            cache_seqlens=operands.lens,
            qkv_dtype=shape.dtype,
            cu_seqlens_q=starts,
            page_size=1,
            causal=True,
            has_softcap=False,
            num_splits=0,
        )

        def call(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor]:
            out = flash_attn_with_kvcache(
                q=operands.q,
                k_cache=keys.unsqueeze(1),
                v_cache=values.unsqueeze(1),
                page_table=slots,
                cache_seqlens=operands.lens,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                softmax_scale=operands.scale,
                causal=True,
                num_splits=0,
                scheduler_metadata=metadata,
            )
            return (out,)

        return [partial(call, keys, values, slots) for slots in operands.slots for keys, values in operands.caches]

    return prepare


def load_flashinfer(device: torch.device) -> TopK:
    """FlashInfer's top-k through a page table. Raises whatever its import, or compiling it, raises."""
    from flashinfer.topk import top_k_page_table_transform

    def top_k(scores: Tensor, slots: Tensor, lens: Tensor, k: int) -> Tensor:
        return top_k_page_table_transform(scores, slots, lens, k)

    scores = torch.rand(2, 4096, device=device)
    top_k(scores, torch.ones_like(scores, dtype=torch.int32), full_lens(2, 4096, device), 8)
    return top_k


def checked_rows(batch: int) -> list[int]:
    """At most `CHECKED_ROWS` rows of a batch, the first and the last among them."""
    count = min(batch, CHECKED_ROWS)
    return [i * (batch - 1) // max(1, count - 1) for i in range(count)]


def reference_rows(operands: Operands) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """The checked rows of the first place with (out, lse, logits), float64, one at a time: long rows are large."""
    keys, values = operands.caches[0]
    for row in checked_rows(len(operands.q)):
        slots = operands.slots[0][row].long()
        found = decode_with_scores(
            operands.q[row : row + 1].double(),
            keys[slots].double(),
            values[slots].double(),
            torch.arange(len(slots), device=slots.device).unsqueeze(0),
            operands.lens[row : row + 1],
            Scaling(operands.scale),
            implementation="reference",
        )
        yield row, found


def decode_deviation(operands: Operands, *found: Tensor) -> float:
    """Largest ‖a − b‖ / ‖b‖ of out, lse and logits (as many as given) over the checked rows; NaN if any is not finite.

    Args:
        operands: what the first call of `operands.calls` had.
        found: what it returned, for all rows.
    """
    if not all(bool(ours.isfinite().all()) for ours in found[:2]):  # logits may be undefined in some rows
        return float("nan")
    return _deviation(operands, found, slice(None))


def scores_deviation(operands: Operands, lse: Tensor, logits: Tensor) -> float:
    """The same of what attention without values gives; all rows are longer than `score_beyond`."""
    return _deviation(operands, (lse, logits), slice(1, None))


def _deviation(operands: Operands, found: tuple[Tensor, ...], of: slice) -> float:
    """Largest ‖a − b‖ / ‖b‖ of `found` and those parts `of` the reference's (out, lse, logits); NaN stays NaN."""
    deviations = [torch.zeros((), dtype=torch.float64, device=operands.q.device)]
    for row, wanted in reference_rows(operands):
        deviations += [
            (ours[row].double() - theirs[0]).norm() / theirs[0].norm()
            for ours, theirs in zip(found, wanted[of], strict=False)
        ]
    return float(torch.stack(deviations).max())


def score_deviation(scores: Tensor, wanted: Tensor, lens: Tensor, selection: Selection) -> float:
    """Largest difference of scores [B, L] among candidates, and at least the set's: see `set_deviation`.

    A union is defined by its places, and an implementation may leave out those that no set needs.
    """
    compared = selection.candidates(lens, scores.shape[1]) & (lens > selection.budget).unsqueeze(1)
    compared &= ~(wanted.isneginf() | scores.isneginf())
    difference = torch.where(compared, (scores - wanted).abs(), 0.0).max()
    positions, counts = selection.choose(scores, lens, implementation="reference")
    # A NaN stays one: `max` keeps its first argument then.
    return max(float(difference), set_deviation(positions, counts, wanted, lens, selection))


def set_deviation(positions: Tensor, counts: Tensor, scores: Tensor, lens: Tensor, selection: Selection) -> float:
    """Share of the reference's set of `scores` that a chosen set differs by, up to scores `SCORE_SLACK` apart.

    Args:
        positions: integer [B, k], valid before counts [B], in any order.
    """
    wanted, wanted_counts = selection.choose(scores, lens, implementation="reference")
    ours, theirs = _as_mask(positions, counts, scores.shape[1]), _as_mask(wanted, wanted_counts, scores.shape[1])
    candidates = selection.candidates(lens, scores.shape[1])
    last = scores.masked_fill(~(theirs & candidates), float("inf")).amin(dim=1, keepdim=True)
    excused = candidates & ((scores - last).abs() <= SCORE_SLACK)
    wrong = int(((ours != theirs) & ~excused).sum())
    miscounted = int((ours.sum(dim=1) - theirs.sum(dim=1)).abs().sum())
    return max(wrong, miscounted) / int(theirs.sum())


def slots_to_positions(chosen: Tensor, slots: Tensor) -> Tensor:
    """int64 positions of chosen slots [B, k] in the rows of slots [B, L]; -1 for a slot of no row or of another row."""
    batch, length = slots.shape
    size = int(max(slots.max(), chosen.max())) + 1
    # [B, size]: a slot of another row must not pass for one of this row.
    table = torch.full((batch, size), -1, device=slots.device)
    table.scatter_(1, slots.long(), torch.arange(length, device=slots.device).expand(batch, -1).contiguous())
    return table.gather(1, chosen.long().clamp(min=0)).masked_fill(chosen < 0, -1)


def _as_mask(positions: Tensor, counts: Tensor, length: int) -> Tensor:
    """bool [B, length]; a position of -1 before `counts` is lost, and so counts as missing."""
    valid = torch.arange(positions.shape[1], device=positions.device) < counts.unsqueeze(1)
    places = positions.long().masked_fill(~valid | (positions < 0), length)
    mask = torch.zeros(len(positions), length + 1, dtype=torch.bool, device=positions.device)
    return mask.scatter_(1, places, True)[:, :length]
