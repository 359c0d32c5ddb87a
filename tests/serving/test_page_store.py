"""Are the bounds of pages those of the keys in SGLang's pool, whatever step of whatever kind wrote them?"""

import pytest
import torch

from lim_kernels.page_bounds import PAGE
from sgl_lim.serving.metrics import settings
from sgl_lim.serving.page_store import PageStore
from support.fake_backend import BUDGET, DECODE, EXTEND
from support.writing_world import DIM, EVERY_KIND, KV_HEADS, SIZE
from support.writing_world import World as WritingWorld


class World(WritingWorld):
    """Layers that choose by bounds."""

    def __init__(self, page_size):
        super().__init__(page_size, lambda pool: PageStore(pool, [2], torch.float32), method="quest")

    def check(self):
        bounds, keys = self.backend.lim.pages.of_layer(2), self.pool.get_key_buffer(2)
        for row in (1, 2):
            for first in range(0, self.lens[row], PAGE):
                slots = self.table[row, first : min(first + PAGE, self.lens[row])].long()
                page = int(slots[0]) // PAGE
                assert torch.equal(bounds.lows[page], keys[slots].amin(0))
                assert torch.equal(bounds.highs[page], keys[slots].amax(0))


@pytest.mark.parametrize("page_size", [16, 64])
def test_bounds_follow_prefills_chunks_mixed_and_decode_steps(page_size):
    world = World(page_size)
    for tokens, mode, how in EVERY_KIND:
        world.step(tokens, mode, **how)
        world.check()


def test_a_page_s_next_owner_bounds_it_anew():
    world = World(16)
    world.step({1: 40, 2: 40}, EXTEND)
    # The first request is gone, and the second gets its pages in another order.
    world.table[2], world.lens = world.table[1].view(-1, PAGE).flip(0).flatten(), [0, 0, 0]
    world.step({2: 128}, EXTEND)
    world.step({1: 5}, EXTEND)
    world.lens[2] = 112  # the first has taken the second's last page
    world.check()


def test_dense_layers_have_no_bounds_and_what_the_others_take_is_shown():
    lim = World(16).backend.lim
    pages = lim.pages
    assert pages.nbytes == 2 * -(-(SIZE + 16) // PAGE) * KV_HEADS * DIM * 4 == settings(lim)["bytes_beside_pool"]
    assert [pages.of_layer(layer) is None for layer in range(3)] == [True, True, False]


def test_padding_alone_bounds_the_page_of_padding_and_no_other():
    world = World(16)
    world.step({1: 20}, EXTEND)
    before = world.backend.lim.pages.of_layer(2).highs.clone()
    world.step({0: 1}, DECODE)
    changed = (world.backend.lim.pages.of_layer(2).highs != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [0]


def test_a_step_s_counters_are_what_its_layers_read():
    world = World(16)
    world.step({1: 37, 2: 9}, EXTEND)
    for _ in range(3):
        world.step({1: 1, 2: 1}, DECODE)
    dense = sum(3 * n for n in (38, 39, 40, 10, 11, 12))
    totals = world.backend.lim.counters.read()
    # Of a set of one page, the tokens that the row's last page has.
    assert totals["tokens_attended"] == sum(2 * n for n in (38, 39, 40)) + (6 + 7 + 8) + 3 * (10 + 11 + 12)
    assert (totals["tokens_dense"], totals["selections"], BUDGET) == (dense, 3, PAGE)
