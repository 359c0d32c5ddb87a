"""SGLang's own row pool, slot allocator and radix cache on the CPU, driven as its scheduler does, without a server.

`RadixWorld` calls what the scheduler calls (`alloc_for_extend`, `release_kv_cache`, ...), inside `sglang_config()`, and
keeps the truth about every slot beside it: which token prefix's KV it holds, and how often it was filled.
"""

import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import NamedTuple

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from support.radix_release import RELEASE, sglang_config
from support.radix_schedule import random_schedule

__all__ = ["Batch", "RadixWorld", "Request", "random_schedule", "sglang_config", "shared_lengths"]

SAMPLING = SamplingParams()


@dataclass(eq=False)
class Request:
    """A request of the world; `path[p]` names the token prefix of length p + 1, `length` of them have KV."""

    req: Req
    path: list[int]
    length: int = 0
    committed: bool = False
    early_steps: int = 0  # decode steps before its prefill's result was processed: 0 or 1 in SGLang

    @property
    def tokens(self) -> list[int]:
        return [*self.req.origin_input_ids, *self.req.output_ids]

    @property
    def row(self) -> int:
        return RELEASE.row(self.req)

    @property
    def protected(self) -> int:
        """Leading tokens whose slots the tree owns; the slots after them are this request's alone."""
        return RELEASE.protected(self.req)


class Batch(NamedTuple):
    """A decode batch; padded rows come last and are row 0 with one token, as a CUDA graph's."""

    req_pool_indices: Tensor  # int64 [B]
    seq_lens: Tensor  # int64 [B]
    table: Tensor  # int32 [rows, max_len], the live req_to_token
    requests: list[Request]  # without the padded rows


def shared_lengths(batch: Batch) -> Tensor:
    """int64 [B, B]: how many leading slots two rows of a batch have in common; padded rows share nothing."""
    rows, lens = batch.req_pool_indices, batch.seq_lens
    width = int(lens.max()) if len(lens) else 0
    slots = batch.table[rows, :width]
    both = torch.minimum(lens[:, None], lens) * (rows[:, None] > 0) * (rows > 0)
    equal = (slots[:, None] == slots) & (torch.arange(width) < both[..., None])
    return equal.to(torch.int32).cumprod(-1).sum(-1)


class RadixWorld:
    """One scheduler's caches, its requests, and the truth about the slots. Slots of page 0 are never handed out."""

    def __init__(
        self,
        page_size: int = 1,
        num_slots: int = 384,
        num_rows: int = 8,
        max_len: int = 96,
        alphabet: int = 3,
        generator: random.Random | None = None,
    ):
        assert num_slots % page_size == 0, f"{num_slots} slots are no whole number of pages of {page_size}"
        self.page_size, self.num_slots, self.max_len = page_size, num_slots, max_len
        self.alphabet = alphabet  # tokens below it are sampled, those from it on tell forks apart
        self.generator = generator or random.Random(0)
        self.pool = ReqToTokenPool(num_rows, max_len, "cpu", enable_memory_saver=False)
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(num_slots, torch.float32, "cpu", kvcache=None, need_sort=False)
        else:
            self.allocator = RELEASE.allocator(num_slots, page_size)
        self.tree = RELEASE.cache(CacheInitParams(False, self.pool, self.allocator, page_size))
        self.live: list[Request] = []  # hold a row, in order of admission
        self.retracted: list[Request] = []  # wait to be resumed
        self.content = torch.full((num_slots + page_size,), -1)  # the token prefix whose KV a slot holds
        self.filled = torch.zeros(num_slots + page_size, dtype=torch.int64)  # how often: the slot's tenancy
        self._wanted = torch.full(self.table.shape, -1)  # what each row's slots should hold
        self._prefixes: dict[tuple[int, int], int] = {}
        self._adapters: dict[str, int] = {}
        self._rids = count()

    @property
    def table(self) -> Tensor:
        """req_to_token, int32 [num_rows + 1, max_len]."""
        return self.pool.req_to_token

    @property
    def generations(self) -> Tensor:
        """req_generation, int64 [num_rows + 1]: which tenant a row has. A flush sets it back to 0 in 0.5.17."""
        return self.pool.req_generation

    @property
    def running(self) -> list[Request]:
        """Live requests whose prompt is all there: a decode batch may hold them, committed or not."""
        return [r for r in self.live if r.length == len(r.path)]

    def key_of(self, slot: int) -> tuple[int, int]:
        """(name of the token prefix whose KV the slot holds, how often the slot was filled)."""
        return int(self.content[slot]), int(self.filled[slot])

    def admit(self, tokens: Sequence[int], chunk: int | None = None, adapter: str | None = None) -> Request | None:
        """Match a prompt, lock the match, fill slots for the rest or the first `chunk` of it; None if it can't fit.

        `adapter` names a LoRA adapter, whose KV is that of no other.
        """
        req = Req(str(next(self._rids)), "", array("q", tokens), SAMPLING, lora_id=adapter)
        return self._start(Request(req, self._path(tokens, adapter)), chunk)

    def resume(self, request: Request, chunk: int | None = None) -> Request | None:
        """Admit a retracted request again, its answer so far included."""
        if self._start(request, chunk) is None:
            return None
        self.retracted.remove(request)
        return request

    def fork(self, request: Request, n: int) -> list[Request]:
        """Up to n new requests: the tokens of another one so far, and one of their own."""
        forks = (self.admit([*request.tokens, self.alphabet + i]) for i in range(n))
        return [fork for fork in forks if fork]

    def prefill(self, request: Request, chunk: int | None = None) -> bool:
        """The next chunk of a prompt whose last chunk is committed; False if it can't fit now."""
        assert request.committed and request.length < len(request.path)
        return self._extend(request, chunk)

    def commit(self, *requests: Request) -> None:
        """Process a prefill's result: the tree takes the prompts, duplicates are freed, the rows are rewritten."""
        with self._freed_together(RELEASE.checkpoints_in_free_group):
            for request in requests:
                RELEASE.checkpoint(self.tree, request.req)
                request.committed, request.early_steps = True, 0

    def decode(self, requests: Sequence[Request]) -> None:
        """One token more for each of these running requests; some are retracted when slots run out."""
        batch = list(requests)
        while batch and not self._decode_fits(batch):
            victim = min(batch, key=lambda r: (len(r.req.output_ids), -len(r.req.origin_input_ids)))
            batch.remove(victim)
            self.retract(victim)
            if not batch:  # SGLang gives the last one up
                self.retracted.remove(victim)
        if not batch:
            return
        rows = torch.tensor([r.row for r in batch])
        lens = torch.tensor([r.length for r in batch])
        RELEASE.decode(self._batch([r.req for r in batch], lens, req_pool_indices=rows, req_pool_indices_cpu=rows))
        for r in batch:
            token = self.generator.randrange(self.alphabet)
            r.req.output_ids.append(token)
            r.path.append(self._prefix(r.path[-1], token))
            r.length += 1
            r.early_steps += not r.committed
        self._fill((rows, lens), torch.tensor([r.path[-1] for r in batch]))

    def finish(self, *requests: Request) -> None:
        """The tree keeps what can be keyed of them, the rest is freed, the rows too."""
        with self._freed_together():
            for request in requests:
                self._release(request, FINISH_LENGTH(length=0), keep=True)

    def abort(self, request: Request) -> None:
        """As finish; a request whose prefill is under way leaves nothing in the tree."""
        self._release(request, FINISH_ABORT(), keep=request in self.running and request.committed)

    def retract(self, request: Request) -> None:
        """Take its KV away, all but what the tree has, and let it wait."""
        self.live.remove(request)
        RELEASE.retract(
            req=request.req,
            remaing_req_count=len(self.live),
            req_to_token_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )
        request.length, request.committed, request.early_steps = 0, False, 0
        self.retracted.append(request)

    def evict(self, num_tokens: int) -> None:
        """Drop at least that many tokens nobody holds from the tree, if it has them."""
        self.tree.evict(EvictParams(num_tokens=num_tokens))

    def flush(self) -> None:
        """Forget everything; SGLang refuses to while a request runs or waits."""
        assert not self.live and not self.retracted
        self.tree.reset()
        self.pool.clear()
        self.allocator.clear()

    def batch(self, requests: Sequence[Request] | None = None, padding: int = 0, shuffle: bool = True) -> Batch:
        """The running requests, or these, as a decode step sees them."""
        requests = list(self.running if requests is None else requests)
        if shuffle:
            self.generator.shuffle(requests)
        rows = torch.tensor([r.row for r in requests] + [0] * padding, dtype=torch.int64)
        lens = torch.tensor([r.length for r in requests] + [1] * padding, dtype=torch.int64)
        return Batch(rows, lens, self.table, requests)

    def check(self) -> None:
        """Every slot has one owner: free, the tree, or one request; every row holds its own prefix's KV."""
        page = self.page_size
        rows, lens, table, requests = self.batch(self.live, shuffle=False)
        kept = [r.protected for r in requests]
        private = [table[r.row, k : r.length : page] // page for r, k in zip(requests, kept, strict=True)]
        private = torch.cat([torch.empty(0, dtype=torch.int64), *private])
        in_tree = self.tree.evictable_size() + self.tree.protected_size()
        cached = self.tree.all_values_flatten()[::page] // page if in_tree else private[:0]
        owners = torch.stack([self._census(pages) for pages in (self.allocator.free_pages, cached, private)])
        counts = owners.sum(0)
        assert counts[0] == 0 and (counts[1:] == 1).all(), f"pages with no owner or several: {owners.tolist()}"
        total = self.allocator.available_size() + in_tree + len(private) * page
        assert total == self.num_slots, f"{total} of {self.num_slots} slots accounted for"
        if not requests:
            return
        position = torch.arange(int(lens.max()))
        slots = table[rows, : len(position)].long()
        live = position < lens[:, None]
        owner = 1 + (position >= torch.tensor(kept)[:, None]).long()
        stray = live & (owners[owner, slots // page] == 0)
        assert not stray.any(), f"rows hold slots that are not theirs: {stray.nonzero().tolist()}"
        wrong = live & (self.content[slots] != self._wanted[rows, : len(position)])
        assert not wrong.any(), f"rows hold another prefix's KV: {wrong.nonzero().tolist()}"

    @contextmanager
    def _freed_together(self, together: bool = True) -> Iterator[None]:
        """Frees take effect at the end, as where the scheduler processes a batch's results."""
        if together:
            self.allocator.free_group_begin()
        yield
        if together:
            self.allocator.free_group_end()

    def _census(self, pages: Tensor) -> Tensor:
        return torch.bincount(pages, minlength=self.num_slots // self.page_size + 1)

    def _prefix(self, parent: int, token: int) -> int:
        return self._prefixes.setdefault((parent, token), len(self._prefixes))

    def _path(self, tokens: Sequence[int], adapter: str | None = None) -> list[int]:
        # A prefix of an adapter has a name of its own.
        path, parent = [], -1 if adapter is None else self._adapters.setdefault(adapter, -2 - len(self._adapters))
        for token in tokens:
            parent = self._prefix(parent, token)
            path.append(parent)
        return path

    def _batch(self, reqs: list[Req], seq_lens: Tensor, **more) -> SimpleNamespace:
        """What SGLang's allocation functions read of a ScheduleBatch."""
        return SimpleNamespace(
            reqs=reqs,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens,
            device="cpu",
            req_to_token_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            maybe_evict_swa=lambda: None,
            is_dllm=lambda: False,
            **more,
        )

    def _start(self, request: Request, chunk: int | None) -> Request | None:
        if not self.pool.available_size() or len(request.path) >= self.max_len:
            return None
        request.req.init_next_round_input(self.tree)
        RELEASE.lock(self.tree, request.req)
        if not self._extend(request, chunk):
            RELEASE.unlock(self.tree, request.req)
            return None
        self.live.append(request)
        return request

    def _extend(self, request: Request, chunk: int | None) -> bool:
        start, end = RELEASE.prefix(request.req), len(request.path)
        if chunk is not None:
            end = min(end, start + chunk)
        reserve = self.page_size if self.page_size > 1 else 0
        if end - start + reserve > self.allocator.available_size() + self.tree.evictable_size():
            return False
        new = {"prefix_lens": [start], "extend_lens": [end - start], "extend_num_tokens": end - start}
        RELEASE.extend(request.req, self._batch([request.req], torch.tensor([end]), **new), end)
        path = torch.tensor(request.path[:end])
        self._wanted[request.row, :start] = path[:start]
        self._fill((request.row, slice(start, end)), path[start:])
        request.length, request.committed = end, False
        return True

    def _fill(self, where: tuple, path: Tensor) -> None:
        slots = self.table[where].long()
        self.content[slots] = path
        self.filled[slots] += 1
        self._wanted[where] = path

    def _decode_fits(self, requests: list[Request]) -> bool:
        need = sum(r.length % self.page_size == 0 for r in requests) * self.page_size
        common.evict_from_tree_cache(self.tree, need)
        return self.allocator.available_size() >= need

    def _release(self, request: Request, reason, keep: bool) -> None:
        self.live.remove(request)
        request.req.finished_reason = reason
        RELEASE.release(self.tree, request.req, keep)
