"""Prefix groups over SGLang's real caches: after any schedule, grouped decode is what each request would get alone.

`RADIX_SCHEDULES` sets how many schedules run; a failure names its seed.
"""

import os
import random

import pytest
import torch

pytest.importorskip("sglang.srt.mem_cache.radix_cache")

from lim_kernels import find_prefix_groups, sparse_decode
from support.driven_layers import whole_rows
from support.fake_backend import BUDGET, attention, batch_of, build, queries
from support.group_oracle import check_group_sets, shared_of_long
from support.prefix_tree import check_tree
from support.radix_world import RadixWorld, random_schedule, sglang_config, shared_lengths
from support.set_oracle import SetRule
from support.step_checks import exact_logits

RULE = SetRule("lessismore", BUDGET, 0.25, 2, "union")
SCHEDULES = int(os.environ.get("RADIX_SCHEDULES", "200"))


@pytest.fixture(scope="module", autouse=True)
def _config():
    with sglang_config():
        yield


def check_groups(world, granule, padding):
    """Groups are those of the rows' shared slots, padded rows aside."""
    batch = world.batch(padding=padding)
    if not len(batch.seq_lens):
        return
    slots = batch.table[batch.req_pool_indices, : int(batch.seq_lens.max())].clone()
    lens = batch.seq_lens
    most = torch.minimum(lens.unsqueeze(0), lens.unsqueeze(1)) - 1  # a row's last token is its own
    shared = shared_lengths(batch).minimum(most).fill_diagonal_(0) // granule * granule
    check_tree(vars(find_prefix_groups(slots, batch.seq_lens, granule=granule)), shared)


def check_decode(world, granule):
    """A step of the whole batch gives every request the outputs of its own step, and the groups are used."""
    batch = world.batch()
    rows, lens = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
    if len(rows) < 2:
        return 0
    together = build(world.table, granule=granule, num_slots=len(world.filled))
    together.init_forward_metadata(batch_of(rows, lens))
    outputs = attention(together, together.lim.plan, len(rows))
    ungrouped = build(world.table, granule=None, num_slots=len(world.filled))
    ungrouped.init_forward_metadata(batch_of(rows, lens))
    expected = attention(ungrouped, ungrouped.lim.plan, len(rows))
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert whole_rows(together.lim.plan) == whole_rows(ungrouped.lim.plan)
    return together.lim.counters.read()["tokens_shared"]


def check_selection(world, granule):
    """Where groups choose together: the rule's sets, attended to as without groups. Returns what rows had in common."""
    batch = world.batch()
    rows, lens = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
    if len(rows) < 2 or max(lens) <= BUDGET:
        return 0
    backend = build(world.table, granule=granule, num_slots=len(world.filled), prefix_selection="group")
    backend.init_forward_metadata(batch_of(rows, lens))
    plan = backend.lim.plan
    _, sparse = attention(backend, plan, len(rows))
    q, k, v = queries(len(rows)), backend.lim.pool.k, backend.lim.pool.v
    ungrouped, _ = sparse_decode(q, k, v, plan.chosen.slots, plan.chosen.ends, scale=0.3)
    torch.testing.assert_close(sparse, ungrouped, rtol=1e-5, atol=1e-6)
    sets = []
    slots = plan.context.slots
    for row, (length, chosen) in enumerate(zip(lens, whole_rows(plan), strict=True)):
        position = {slot: place for place, slot in enumerate(slots[row, :length].tolist())}
        sets.append([position[slot] for slot in chosen])
    exact = [exact_logits(q[row], k[slots[row, :length].long()], 0.3) for row, length in enumerate(lens)]
    shared = shared_of_long(slots, lens, budget=BUDGET, granule=granule)
    check_group_sets(RULE, sets, *(list(part) for part in zip(*exact, strict=True)), shared)
    return int(plan.shared.in_sets.already_read.sum())


@pytest.mark.parametrize("page", [1, 16], ids=["page1", "page16"])
def test_groups_hold_after_any_schedule(page):
    shared = shared_of_sets = 0
    for seed in range(SCHEDULES // 2):
        draw = random.Random(seed)
        world = RadixWorld(page, num_slots=draw.choice((96, 192, 384)), generator=draw)
        done = []
        try:
            for name in random_schedule(draw, world):
                done.append(name)
                check_groups(world, granule=draw.choice((1, 4, 16)), padding=len(done) % 3)
                if len(done) % 7 == 0:
                    shared += check_decode(world, granule=draw.choice((1, 8)))
                    shared_of_sets += check_selection(world, granule=draw.choice((1, 8)))
            world.check()
        except Exception as error:
            raise AssertionError(f"page size {page}, seed {seed}, after {done}: {error}") from error
    assert shared > 100 * SCHEDULES, "hardly any schedule shared a prefix, so the test says little"
    assert shared_of_sets > 20 * SCHEDULES, "hardly any sets had anything in common"


def test_a_group_dissolves_and_forms_between_two_replays():
    """Duplicates that a prefill left are replaced by the tree's slots after the first decode step."""
    world = RadixWorld(1, num_slots=192, generator=random.Random(0))
    prompt = [0, 1, 2, 1] * 8
    requests = [world.admit([*prompt, last]) for last in (0, 1, 2)]
    backend = build(world.table, granule=4)
    backend.init_cuda_graph_state(4, 4)

    def grouped() -> list[int]:
        batch = world.batch(shuffle=False)
        view = batch_of(batch.req_pool_indices.tolist(), batch.seq_lens.tolist())
        backend.init_forward_metadata_out_graph(view)
        backend.init_forward_metadata_in_graph(view)
        return backend.lim.plan.context.groups.own_starts.tolist()

    assert grouped() == [0, 0, 0]
    world.commit(*requests)
    assert grouped() == [32, 32, 32]
    world.finish(requests[0])
    assert grouped() == [32, 32]
    world.abort(requests[1])
    latest = world.admit([*prompt, 3])
    assert latest is not None and grouped() == [32, 32]


@pytest.mark.parametrize("page", [1, 16], ids=["page1", "page16"])
def test_a_group_is_of_one_lora_adapter(page):
    """SGLang keys its cache by adapter (`Req.extra_key`), so equal prompts of different ones have no slot in common."""
    world = RadixWorld(page, num_slots=384, generator=random.Random(0))
    prompt = [0, 1, 2, 1] * 8
    adapters = [None, "first", "second", "first", None]
    for adapter in adapters:
        request = world.admit(prompt, adapter=adapter)
        world.commit(request)
    world.check()
    batch = world.batch(shuffle=False)
    shared = shared_lengths(batch) >= len(prompt) // 2
    assert shared.tolist() == [[one == other for other in adapters] for one in adapters]
    check_groups(world, granule=4, padding=1)
    assert check_decode(world, granule=4) > 0
