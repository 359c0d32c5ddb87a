"""The harness over SGLang's caches is right, and rows of a batch share a leading run of slots and nothing else."""

import os
import random
from itertools import takewhile

import pytest
import torch

pytest.importorskip("sglang.srt.mem_cache.radix_cache")

from support.radix_world import RadixWorld, Request, random_schedule, sglang_config, shared_lengths

SCHEDULES = int(os.environ.get("RADIX_SCHEDULES", "300"))
PAGES = [1, 16]
SYSTEM = [0, 1, 2, 1] * 8


@pytest.fixture(scope="module", autouse=True)
def _config():
    with sglang_config():
        yield


@pytest.fixture(params=PAGES, ids=["page1", "page16"])
def page(request) -> int:
    return request.param


def seeded_world(page: int, seed: int) -> RadixWorld:
    generator = random.Random(seed)
    return RadixWorld(page, num_slots=generator.choice((96, 128, 192, 384)), generator=generator)


def shared_by_ownership(one: Request, other: Request, page: int) -> int:
    """Leading tokens of which the tree owns one copy and both hold it, from the tokens and nothing else."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.path, other.path, strict=False)))
    return min(common // page * page, one.protected, other.protected)


def assert_shared_is_a_leading_run(world: RadixWorld, padding: int) -> None:
    """Slots equal at N - 1 means exactly: the first N are equal and hold one KV. So bisection finds the last such N."""
    batch = world.batch(padding=padding)
    shared, requests = shared_lengths(batch), batch.requests
    size = len(requests)
    assert not shared[size:].any() and not shared[:, size:].any(), "padded rows share slots"
    width = int(batch.seq_lens.max()) if len(batch.seq_lens) else 0
    slots, lens = batch.table[batch.req_pool_indices[:size], :width], batch.seq_lens[:size]
    position = torch.arange(width)
    both = position < torch.minimum(lens[:, None], lens)[..., None]
    equal = (slots[:, None] == slots) & both
    assert torch.equal(equal, position < shared[:size, :size, None]), "slots are equal behind unequal ones"
    for i, one in enumerate(requests):
        expected = [shared_by_ownership(one, other, world.page_size) for other in requests]
        expected[i] = one.length
        assert shared[i, :size].tolist() == expected, f"row {one.row} shares {shared[i].tolist()} instead of {expected}"


def held(world: RadixWorld) -> dict[Request, tuple[list[int], list[int]]]:
    """The slots of every live request, and their tenancies."""
    rows, lens, table, requests = world.batch(world.live, shuffle=False)
    slots = table[rows].long()
    pairs = zip(requests, lens.tolist(), slots.tolist(), world.filled[slots].tolist(), strict=True)
    return {request: (row[:length], filled[:length]) for request, length, row, filled in pairs}


@pytest.mark.parametrize("part", range(4))
def test_rows_share_a_leading_run_of_slots_after_any_schedule(page, part):
    for seed in range(part, SCHEDULES // len(PAGES), 4):
        world, done = seeded_world(page, seed), []
        try:
            for name in random_schedule(world.generator, world):
                done.append(name)
                world.check()
                assert_shared_is_a_leading_run(world, padding=len(done) % 3)
        except Exception as error:
            raise AssertionError(f"page size {page}, seed {seed}, after {done}: {error}") from error


def test_a_live_row_changes_only_when_its_own_prefill_is_committed(page):
    for seed in range(30):
        world = seeded_world(page, seed)
        before, open_results = {}, []
        for name in random_schedule(world.generator, world):
            after = held(world)
            for request in before.keys() & after.keys():
                if request in open_results and request.committed:
                    continue
                (slots, filled), (now, refilled) = before[request], after[request]
                same = now[: len(slots)] == slots and refilled[: len(slots)] == filled
                assert same, f"seed {seed}: {name} changed row {request.row}"
            before, open_results = after, [r for r in world.live if not r.committed]


def test_schedules_share_prefixes_run_short_and_reuse_slots(page):
    """The property above is not about empty batches."""
    sharing = batches = short = reused = 0
    for seed in range(30):
        world = seeded_world(page, seed)
        waiting = 0
        for name in random_schedule(world.generator, world):
            shared = shared_lengths(world.batch()).fill_diagonal_(0)
            batches += len(shared) > 1
            sharing += bool((shared >= page).any())
            short += name == "decode" and len(world.retracted) > waiting
            waiting = len(world.retracted)
        reused += int((world.filled > 1).sum())
    assert batches > 400 and sharing > batches / 3
    assert short > 3 and reused > 1000


def test_equal_cold_prompts_share_once_both_are_committed(page):
    world = RadixWorld(page)
    first, second = world.admit(SYSTEM), world.admit(SYSTEM)
    assert shared_lengths(world.batch(shuffle=False))[0, 1] == 0
    world.commit(first)
    assert shared_lengths(world.batch(shuffle=False))[0, 1] == 0
    world.decode([first, second])
    mine = int(world.table[second.row, len(SYSTEM)])
    world.commit(second)
    world.check()
    assert shared_lengths(world.batch(shuffle=False))[0, 1] == len(SYSTEM)
    assert world.table[second.row, len(SYSTEM)] == mine  # decoded before the rewrite, and kept


def test_a_fork_shares_decoded_tokens_once_its_parent_finished(page):
    world = RadixWorld(page)
    parent = world.admit(SYSTEM)
    world.commit(parent)
    for _ in range(20):
        world.decode([parent])
    early = world.fork(parent, 1)
    world.commit(*early)
    assert shared_lengths(world.batch([parent, *early], shuffle=False))[0, 1] == len(SYSTEM)
    world.abort(early[0])
    tokens = parent.tokens
    world.finish(parent)
    late = [world.admit([*tokens, 7 + i]) for i in range(2)]
    world.check()
    assert shared_lengths(world.batch(late, shuffle=False))[0, 1] == len(tokens) // page * page


def test_a_prompt_in_chunks_is_in_no_batch_until_it_is_complete(page):
    world = RadixWorld(page)
    request = world.admit(SYSTEM, chunk=21)
    assert request.length == 21 and not world.running
    world.commit(request)
    assert world.prefill(request)
    world.check()
    assert world.running == [request] and request.length == len(SYSTEM)


def test_a_retracted_request_is_resumed_with_its_answer(page):
    world = RadixWorld(page)
    request = world.admit(SYSTEM)
    world.commit(request)
    world.decode([request])
    row, generation = request.row, int(world.generations[request.row])
    world.retract(request)
    world.check()
    assert world.resume(request) is request and request.length == len(SYSTEM) + 1
    world.check()
    assert request.row != row or world.generations[row] == generation + 1


def test_a_slot_counts_its_tenants(page):
    world = RadixWorld(page, num_slots=64, num_rows=2)
    request = world.admit(SYSTEM)
    slot = int(world.table[request.row, 0])
    name, filled = world.key_of(slot)
    assert filled == 1 and name == request.path[0]
    world.abort(request)
    for token in range(3):
        world.finish(world.admit([token] * 40))
    world.check()
    assert world.key_of(slot)[1] > 1


def test_a_prompt_that_cannot_fit_is_refused(page):
    world = RadixWorld(page, num_slots=64)
    first = world.admit(SYSTEM)
    assert world.admit([2] * 60) is None
    world.check()
    world.finish(first)
    assert world.admit([2] * 40) is not None  # what nobody holds is evicted
    world.check()


@pytest.mark.parametrize("damage", ["leak", "double free", "foreign slot", "foreign content"])
def test_check_notices(page, damage):
    world = RadixWorld(page)
    one, other = world.admit(SYSTEM), world.admit([2, *SYSTEM])
    world.check()
    if damage == "leak":
        world.allocator.alloc(page)
    elif damage == "double free":
        world.allocator.free(world.table[one.row, :page].long())
    elif damage == "foreign slot":
        world.table[one.row, 0] = world.table[other.row, 0]
    else:
        world.content[world.table[one.row, 3]] += 1
    with pytest.raises(AssertionError):
        world.check()
