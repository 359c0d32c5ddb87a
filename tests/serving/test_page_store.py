"""Are the bounds of pages those of the keys in SGLang's pool, whatever step of whatever kind wrote them?"""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lim_kernels.page_bounds import PAGE
from sgl_lim.serving.backend import store_kv
from sgl_lim.serving.page_store import PageStore
from support.fake_backend import BUDGET, DECODE, EXTEND, MIXED, Dense, batch_of, build

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 20 * PAGE


class Storing(Dense):
    """A dense backend that stores keys and values and attends to nothing."""

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        if save_kv_cache:
            store_kv(self.lim.pool, layer, forward_batch, k, v)
        return q

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)


class World:
    """Two requests whose rows fill pages in order; every step runs through our backend, layer by layer."""

    def __init__(self, page_size):
        generator = torch.Generator().manual_seed(2)
        pages = (torch.randperm(SIZE // page_size, generator=generator) + 1)[: 2 * (128 // page_size)]
        rows = (pages.unsqueeze(1) * page_size + torch.arange(page_size)).view(2, 128)
        # Row 0 of the request pool is padding.
        self.table = torch.cat([torch.zeros(1, 128, dtype=torch.long), rows]).int()
        self.pool = MHATokenToKVPool(SIZE, page_size, torch.float32, KV_HEADS, DIM, 3, "cpu", False)
        self.backend = build(self.table, Storing, granule=None, method="quest")
        self.backend.lim.pool = self.pool
        self.backend.lim.pages = PageStore(self.pool, [2], torch.float32)
        self.generator, self.lens = generator, [0, 0, 0]

    def layer(self, index):
        heads = {"tp_q_head_num": HEADS, "qk_head_dim": DIM, "v_head_dim": DIM, "is_cross_attention": False}
        scales = {"scaling": 0.3, "logit_cap": 0.0, "k_scale": None, "v_scale": None, "sliding_window_size": -1}
        return SimpleNamespace(layer_id=index, **heads, **scales)

    def step(self, tokens, mode, *, prepared=True, stored=False):
        """Requests get so many tokens each; `stored`: the model stores keys itself."""
        rows = [row for row, count in tokens.items() if count or row == 0]
        written = []
        for row in rows:
            first = self.lens[row]
            self.lens[row] += tokens[row]
            written += self.table[row, first : first + tokens[row]].tolist() if row else [0]
        lens = [self.lens[row] or 1 for row in rows]
        more = {"extend_seq_lens": torch.tensor([tokens[row] for row in rows]), "out_cache_loc_is_physical": False}
        batch = batch_of(rows, lens, mode, written=written, **more)
        self.backend.init_forward_metadata(batch)
        if not prepared:
            self.backend.lim.plan = None
        forward = self.backend.forward_decode if mode == DECODE else self.backend.forward_extend
        for index in range(3):
            q, k, v = (
                torch.randn(len(written), heads, DIM, generator=self.generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            if stored:
                store_kv(self.pool, self.layer(index), batch, k, v)
            forward(q, k, v, self.layer(index), batch, save_kv_cache=not stored)

    def check(self):
        bounds, keys = self.backend.lim.pages.bounds(2), self.pool.get_key_buffer(2)
        for row in (1, 2):
            for first in range(0, self.lens[row], PAGE):
                slots = self.table[row, first : min(first + PAGE, self.lens[row])].long()
                page = int(slots[0]) // PAGE
                assert torch.equal(bounds.lows[page], keys[slots].amin(0))
                assert torch.equal(bounds.highs[page], keys[slots].amax(0))


@pytest.mark.parametrize("page_size", [16, 64])
def test_bounds_follow_prefills_chunks_mixed_and_decode_steps(page_size):
    world = World(page_size)
    for tokens, mode, how in (
        ({1: 40, 2: 7}, EXTEND, {}),
        ({1: 13}, EXTEND, {}),
        ({1: 1, 2: 30}, MIXED, {}),
        ({1: 1, 2: 1}, DECODE, {}),
        ({2: 1, 0: 1}, DECODE, {}),  # padded rows of a captured graph write slot 0
        ({1: 1, 2: 1}, DECODE, {"stored": True}),
        ({1: 1, 2: 1}, DECODE, {"prepared": False}),
        ({2: 20}, EXTEND, {"stored": True}),
        *[({1: 1, 2: 1}, DECODE, {})] * 17,
    ):
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


def test_dense_layers_have_no_bounds():
    pages = World(16).backend.lim.pages
    assert [pages.bounds(layer) is None for layer in range(3)] == [True, True, False]


def test_padding_alone_bounds_the_page_of_padding_and_no_other():
    world = World(16)
    world.step({1: 20}, EXTEND)
    before = world.backend.lim.pages.bounds(2).highs.clone()
    world.step({0: 1}, DECODE)
    changed = (world.backend.lim.pages.bounds(2).highs != before).flatten(1).any(1)
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
