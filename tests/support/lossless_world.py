"""A `RadixWorld` whose decode steps are rounds of a lossless server: drafts, a verification, some of it rejected."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from sglang.srt.mem_cache import allocation, common
from sglang.srt.runtime_context import get_spec
from torch import Tensor

from lim_patches.slots_on_cpu import assign
from support.radix_world import RadixWorld, Request, sglang_config


@contextmanager
def lossless_config() -> Iterator[None]:
    """Publish a server configuration under which requests may own slots beyond their tokens; without Triton."""
    with ExitStack() as stack:
        stack.enter_context(sglang_config())
        stack.enter_context(get_spec().override(speculative_algorithm="LESSISMORE"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(allocation, "assign_req_to_token_pool_func", partial(assign, None))
        patch.setattr(allocation, "get_last_loc", allocation.get_last_loc_torch)
        yield


class LosslessWorld(RadixWorld):
    """Its requests reserve slots for two rounds, as SGLang does, and a round commits 1 … `drafts` + 1 tokens of each.

    Args:
        drafts: of a round.
    """

    REJECTED = -2
    """What a slot holds that was written by a draft which was not accepted."""

    def __init__(self, *args, drafts: int = 3, **options) -> None:
        super().__init__(*args, **options)
        self.drafts = drafts
        self.last: dict[Request, tuple[int, int]] = {}  # length before the last round, tokens that it kept
        self.accept = self.generator.randint  # of (1, drafts + 1): tokens that a round keeps of a request

    def decode(self, requests: Sequence[Request]) -> None:
        """A round of those of these requests whose row has room; some are retracted when slots run out."""
        self.last.clear()
        batch = [r for r in requests if self.reserved(r) <= self.max_len]
        while batch and not self._round_fits(batch):
            victim = min(batch, key=lambda r: (len(r.req.output_ids), -len(r.req.origin_input_ids)))
            batch.remove(victim)
            self.retract(victim)
            if not batch:  # SGLang gives the last one up
                self.retracted.remove(victim)
        if batch:
            self._reserve(batch)
            for request in batch:
                self._commit_round(request)

    def reserved(self, request: Request) -> int:
        """Length up to which SGLang reserves slots for a round."""
        end = request.length + 2 * (self.drafts + 1)
        return -(-end // self.page_size) * self.page_size

    def allocated(self, request: Request) -> int:
        """Length up to which a request owns slots."""
        return request.req.kv.kv_allocated_len

    def run_of(self, request: Request) -> Tensor:
        """KV slots of the tokens that the last round verified of a request."""
        start, _ = self.last[request]
        return self.table[request.row, start : start + self.drafts + 1]

    def _round_fits(self, batch: list[Request]) -> bool:
        need = sum(max(0, self.reserved(r) - self.allocated(r)) for r in batch)
        need += len(batch) * self.page_size * (self.page_size > 1)
        common.evict_from_tree_cache(self.tree, need)
        return self.allocator.available_size() >= need

    def _reserve(self, batch: list[Request]) -> None:
        rows = torch.tensor([r.row for r in batch])
        now = torch.tensor([self.allocated(r) for r in batch], dtype=torch.int32)
        then = torch.maximum(now, torch.tensor([self.reserved(r) for r in batch], dtype=torch.int32))
        allocation.alloc_for_spec_decode(
            self.tree,
            self.pool,
            reqs=[r.req for r in batch],
            req_pool_indices=rows,
            cur_kv_lens=now,
            cur_kv_lens_cpu=now,
            nxt_kv_lens=then,
            nxt_kv_lens_cpu=then,
            num_needed_tokens=int((then - now).sum()),
            batch=self._batch([r.req for r in batch], torch.tensor([r.length for r in batch])),
        )

    def _commit_round(self, request: Request) -> None:
        kept, start = self.accept(1, self.drafts + 1), request.length
        for _ in range(kept):
            token = self.generator.randrange(self.alphabet)
            request.req.output_ids.append(token)
            request.path.append(self._prefix(request.path[-1], token))
        request.length += kept
        request.early_steps += not request.committed
        set_committed(request, request.length)
        self.last[request] = start, kept
        # A verification writes all of its tokens' slots, whatever becomes of them.
        written = self.run_of(request).long()
        self.content[written] = self.REJECTED
        self.filled[written] += 1
        self.content[written[:kept]] = torch.tensor(request.path[start:])
        self._wanted[request.row, start : start + kept] = torch.tensor(request.path[start:])

    def check(self) -> None:
        """As the radix world's, and what a request reserves is its own as well; see `RadixWorld.check`."""
        spare = {r: self.table[r.row, r.length : self.allocated(r)].tolist() for r in self.live}
        owned = [slot // self.page_size for r in self.live for slot in self.private(r)]
        kept = self.tree.evictable_size() + self.tree.protected_size()
        in_tree = self.tree.all_values_flatten().tolist() if kept else []
        cached = {slot // self.page_size for slot in in_tree}
        free = set(self.allocator.free_pages.tolist())
        assert len(owned) == len(set(owned)), "two requests own one page"
        assert not cached & set(owned) and not free & (cached | set(owned)), "a page has two owners"
        assert len(free) + len(cached) + len(owned) == self.num_slots // self.page_size, "a page has no owner"
        for r in self.live:
            slots = self.table[r.row, : r.length].long()
            assert self.content[slots].tolist() == r.path[: r.length], "a row holds another prefix's KV"
            assert not set(spare[r]) & set(in_tree), "what a request reserved is in the tree"
        assert self.REJECTED not in self.content[in_tree].tolist(), "a rejected token is in the tree"

    def private(self, request: Request) -> list[int]:
        """First slots of the pages that a request alone owns."""
        return self.table[request.row, request.protected : self.allocated(request) : self.page_size].tolist()


def set_committed(request: Request, length: int) -> None:
    """As SGLang does once it has looked at a round's results."""
    owner = request.req if hasattr(request.req, "kv_committed_len") else request.req.kv
    owner.kv_committed_len = length


def drawn(seed: int, page: int = 1, drafts: int = 3, **options) -> tuple[random.Random, LosslessWorld]:
    """A generator and a world whose size follows from it."""
    draw = random.Random(seed)
    slots = draw.choice((192, 288, 480)) // page * page
    return draw, LosslessWorld(page, num_slots=slots, generator=draw, drafts=drafts, **options)
