"""What is learnt of requests whose KV nobody here was seen to write: a prefill server's, or a host cache's."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lim_kernels.page_bounds import PAGE
from lim_kernels.row_actions import EARLY, RECALL, SELECT
from sgl_lim.serving.arrivals import Arrivals, note_batch
from sgl_lim.serving.page_store import PageStore
from sgl_lim.settings.arriving_kv import LOADERS, brings_kv
from support.fake_backend import BUDGET, EXTEND, HEADS, LAYERS, MIXED, attention, batch_of, build
from support.gates import gates_for

KV_HEADS, DIM, ROWS, LENGTH = 2, 8, 3, 128
DECODE_SERVER = {"disaggregation_mode": "decode"}


def rows_of_pages():
    """Row 0 of the request pool is padding, and so is page 0."""
    pages = torch.randperm(ROWS * LENGTH // PAGE, generator=torch.Generator().manual_seed(3)) + 1
    rows = (pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).view(ROWS, LENGTH)
    return torch.cat([torch.zeros(1, LENGTH, dtype=torch.long), rows]).int()


class World:
    """Rows of a request pool of a decode server, over KV that no step of ours wrote."""

    def __init__(self, **values):
        self.table = rows_of_pages()
        self.backend = build(self.table, granule=None, num_slots=(ROWS * LENGTH) + PAGE, server=DECODE_SERVER, **values)
        self.lim = self.backend.lim

    def arrive(self, *rows):
        self.lim.rows.req_generation[list(rows)] += 1

    def decode(self, rows, lens, *, noted=True, **more):
        """Prepare a decode step as SGLang does; a batch that no scheduler made is not noted."""
        if noted:
            note_batch(self.lim.rows, torch.tensor([row for row in rows if row]))
        batch = batch_of(rows, lens, written=[int(self.table[r, n - 1]) for r, n in zip(rows, lens, strict=True)])
        vars(batch).update(more)
        self.backend.init_forward_metadata(batch)


@pytest.fixture
def quest():
    world = World(method="quest")
    world.lim.pool = MHATokenToKVPool(ROWS * LENGTH, PAGE, torch.float32, KV_HEADS, DIM, 3, "cpu", False)
    generator = torch.Generator().manual_seed(4)
    for layer in range(3):
        world.lim.pool.get_key_buffer(layer).normal_(generator=generator)
    world.lim.pages = PageStore(world.lim.pool, [1, 2], torch.float32)
    return world


def bounded(world, layer, row, length):
    """Whether each page of a row's first tokens has the bounds of its keys."""
    bounds, keys = world.lim.pages.of_layer(layer), world.lim.pool.get_key_buffer(layer)
    found = []
    for first in range(0, length, PAGE):
        slots = world.table[row, first : min(first + PAGE, length)].long()
        page = int(slots[0]) // PAGE
        found.append(
            torch.equal(bounds.lows[page], keys[slots].amin(0)) and torch.equal(bounds.highs[page], keys[slots].amax(0))
        )
    return found


@pytest.mark.parametrize("on_host", [True, False], ids=["lengths-on-host", "lengths-on-device"])
def test_pages_are_bounded_when_a_row_first_decodes(quest, on_host):
    quest.arrive(1, 2)
    # The current token is not there yet; padded rows of a captured graph come last.
    quest.decode([2, 1, 0], [38, 97, 1], **({} if on_host else {"seq_lens_cpu": None}))
    for layer in (1, 2):
        assert all(bounded(quest, layer, 2, 37)) and all(bounded(quest, layer, 1, 96))
    assert not any(bounded(quest, 1, 3, LENGTH)), "a row that is not in the batch"


def test_gate_keys_are_made_when_a_row_first_decodes():
    """The current token completes a block of row 1: its key is made when that token is stored, and not before."""
    world = World(method="seerattention", gates=gates_for(LAYERS, HEADS, KV_HEADS, DIM))
    world.arrive(1, 2)
    world.decode([2, 1, 0], [38, 96, 1])
    arrived = [world.lim.pages.of_layer(layer).keys.clone() for layer in range(LAYERS)]
    for layer, keys in enumerate(arrived):
        assert sorted((keys != 0).flatten(1).any(1).nonzero().flatten().tolist()) == sorted(
            int(world.table[row, first]) // PAGE
            for row, count in ((2, 2), (1, 5))
            for first in range(0, count * PAGE, PAGE)
        )
        # As if prefills had written them here.
        world.lim.pages.of_layer(layer).keys.zero_()
        for row, length in ((2, 37), (1, 95)):
            world.lim.pages.learn(layer, world.table[row, :length], torch.arange(length))
        torch.testing.assert_close(world.lim.pages.of_layer(layer).keys, keys, rtol=1e-5, atol=1e-6)


def test_a_row_is_learnt_once_for_each_tenant(quest):
    quest.arrive(1)
    quest.decode([1], [50])
    page = int(quest.table[1, 0]) // PAGE
    quest.lim.pages.of_layer(1).lows[page] = 7
    quest.decode([1], [51])
    assert (quest.lim.pages.of_layer(1).lows[page] == 7).all(), "nothing new"
    quest.arrive(1)
    quest.decode([1], [40])
    assert all(bounded(quest, 1, 1, 39))


def test_a_row_of_one_token_has_nothing_to_bound(quest):
    before = quest.lim.pages.of_layer(1).highs.clone()
    quest.arrive(1)
    quest.decode([1], [1])
    changed = (quest.lim.pages.of_layer(1).highs != before).flatten(1).any(1)
    assert not changed[1:].any()


def test_only_decode_steps_of_the_scheduler_learn(quest):
    quest.arrive(1)
    for mode in (EXTEND, MIXED):
        note_batch(quest.lim.rows, torch.tensor([1]))
        batch = batch_of([1], [20], mode, written=quest.table[1, :20].tolist(), extend_seq_lens=torch.tensor([20]))
        quest.backend.init_forward_metadata(batch)
    note_batch(quest.lim.rows, None)
    quest.decode([1], [50], noted=False)  # a graph is captured: its rows are nobody's
    assert not any(bounded(quest, 1, 1, 49))
    quest.decode([1], [51])
    assert all(bounded(quest, 1, 1, 50))


@pytest.mark.parametrize("early", [False, True])
def test_what_slots_remember_of_others_is_not_recalled(early):
    """The first tenant selects on its slots; the second gets them with KV that was loaded."""
    world = World(selection_interval=8, early_sets=early)
    world.arrive(1)
    for length in (60, 61):
        world.decode([1], [length])
        attention(world.backend, world.lim.plan, 1)
    assert world.lim.kept_sets.memory.stamps.count_nonzero() > 0
    world.table[2] = world.table[1]
    world.arrive(2)
    world.decode([2], [64])
    assert world.lim.plan.kept.actions.tolist() == [SELECT]
    assert world.lim.kept_sets.memory.stamps.count_nonzero() == 0
    attention(world.backend, world.lim.plan, 1)
    world.decode([2], [65])
    assert world.lim.plan.kept.actions.tolist() == [EARLY if early else 0], "it goes on as ever"


def test_what_slots_remember_is_recalled_where_all_writes_are_seen():
    """The control of the test above: the same steps on a server to which no KV comes from elsewhere."""
    world = World(selection_interval=8)
    world.lim.arrivals = None
    world.arrive(1)
    world.decode([1], [60])
    attention(world.backend, world.lim.plan, 1)
    world.table[2] = world.table[1]
    world.arrive(2)
    world.decode([2], [64])
    assert world.lim.plan.kept.actions.tolist() == [RECALL]


@pytest.mark.parametrize(
    ("server", "brought"),
    [
        ({}, False),
        ({"disaggregation_mode": "null"}, False),
        ({"disaggregation_mode": "prefill"}, False),
        (DECODE_SERVER, True),
        *(({name: True}, True) for name in LOADERS),
    ],
)
def test_kv_comes_from_elsewhere_by_these_flags(server, brought):
    assert brings_kv(SimpleNamespace(**server)) is brought
    for how in ({"method": "quest"}, {"early_sets": True}):
        lim = build(torch.zeros(4, LENGTH, dtype=torch.int32), server=server, **how).lim
        assert isinstance(lim.arrivals, Arrivals) is brought
    plain = build(torch.zeros(4, LENGTH, dtype=torch.int32), server=server).lim
    assert plain.arrivals is None and BUDGET < LENGTH
