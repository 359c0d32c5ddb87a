"""Requests whose steps of every kind run through our backend, layer by layer, over a KV pool of SGLang's."""

from types import SimpleNamespace

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from lim_kernels.page_bounds import PAGE
from sgl_lim.serving.backend import store_kv
from support.fake_backend import DECODE, EXTEND, MIXED, Dense, batch_of, build

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 20 * PAGE
EVERY_KIND = (
    ({1: 40, 2: 7}, EXTEND, {}),
    ({1: 13}, EXTEND, {}),
    ({1: 1, 2: 30}, MIXED, {}),
    ({1: 1, 2: 1}, DECODE, {}),
    ({2: 1, 0: 1}, DECODE, {}),  # padded rows of a captured graph write slot 0
    ({1: 1, 2: 1}, DECODE, {"stored": True}),
    ({1: 1, 2: 1}, DECODE, {"prepared": False}),
    ({2: 20}, EXTEND, {"stored": True}),
    *[({1: 1, 2: 1}, DECODE, {})] * 17,
)
"""Steps of every kind, as `World.step` takes them."""


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

    def __init__(self, page_size, pages_of, k_scales=None, **config):
        """`pages_of` makes what layers choose by for a pool; `config` is the method's.

        `k_scales`: of each layer, by which an fp8 pool stores keys; None for a pool of float32.
        """
        self.k_scales = k_scales
        generator = torch.Generator().manual_seed(2)
        pages = (torch.randperm(SIZE // page_size, generator=generator) + 1)[: 2 * (128 // page_size)]
        rows = (pages.unsqueeze(1) * page_size + torch.arange(page_size)).view(2, 128)
        # Row 0 of the request pool is padding.
        self.table = torch.cat([torch.zeros(1, 128, dtype=torch.long), rows]).int()
        dtype = torch.float32 if k_scales is None else torch.float8_e4m3fn
        self.pool = MHATokenToKVPool(SIZE, page_size, dtype, KV_HEADS, DIM, 3, "cpu", False)
        self.backend = build(self.table, Storing, granule=None, **config)
        self.backend.lim.pool = self.pool
        self.backend.lim.pages = pages_of(self.pool)
        self.generator, self.lens = generator, [0, 0, 0]

    def layer(self, index):
        heads = {"tp_q_head_num": HEADS, "qk_head_dim": DIM, "v_head_dim": DIM, "is_cross_attention": False}
        scales = {"scaling": 0.3, "logit_cap": 0.0, "v_scale": None, "sliding_window_size": -1}
        known = None if self.k_scales is None else self.k_scales[index]
        stored = {"k_scale": None if known is None else torch.tensor(known), "k_scale_float": known}
        return SimpleNamespace(layer_id=index, **heads, **scales, **stored)

    def step(self, tokens, mode, *, prepared=True, stored=False):
        """Requests get so many tokens each; `stored`: the model stores keys itself."""
        rows = [row for row, count in tokens.items() if count or row == 0]
        written, positions = [], []
        for row in rows:
            first = self.lens[row]
            self.lens[row] += tokens[row]
            # A row that pads has no position.
            positions += range(first, first + tokens[row]) if row else [0]
            written += self.table[row, first : first + tokens[row]].tolist() if row else [0]
        lens = [self.lens[row] or 1 for row in rows]
        more = {"extend_seq_lens": torch.tensor([tokens[row] for row in rows]), "out_cache_loc_is_physical": False}
        # Prefills that run as pieces of a graph have padded positions, and the slots of real tokens alone.
        more["positions"] = torch.tensor(positions + [0] * (3 if mode == EXTEND else 0))
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
