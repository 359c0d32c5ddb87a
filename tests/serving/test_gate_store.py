"""Are gate keys those of the keys in SGLang's pool, whatever step of whatever kind completed their block?"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lim_kernels.block_gates import Rotation
from sgl_lim.serving import gate_store
from sgl_lim.serving import layer as layer_module
from sgl_lim.serving.gate_store import GateStore
from support.fake_backend import DECODE, EXTEND
from support.gate_oracle import GateRule, angles, draw_gate, gate_key, rope
from support.gates import gates_for
from support.writing_world import DIM, EVERY_KIND, HEADS, KV_HEADS, World

RULE = GateRule(HEADS, KV_HEADS, DIM, width=16, block=16)
PUBLISHED = draw_gate(RULE, torch.Generator().manual_seed(9), torch.float32)
# A norm takes every scale out of a key.
WITHOUT_NORM = draw_gate(replace(RULE, norm=False), torch.Generator().manual_seed(9), torch.float32)
K_SCALES = (0.5, 2.0, 3.0)


class GatedWorld(World):
    """Every layer chooses by gates of blocks of 16."""

    def __init__(self, page_size, published=PUBLISHED, **config):
        gates = gates_for(3, HEADS, KV_HEADS, DIM)
        self.published = published
        super().__init__(page_size, self.store, method="seerattention", gates=gates, **config)

    def store(self, pool):
        gate, turned = self.published.as_operand(), Rotation(angles(DIM, 256, 1.0))
        layers = {0: gate, 1: gate, 2: replace(gate, key=2 * gate.key)}
        attentions = {layer: self.layer(layer) for layer in layers}
        return GateStore(pool, layers, dict.fromkeys(layers, turned), attentions, RULE.block)

    def check(self, layer=2):
        """The keys of all complete blocks are the paper's; twice the weights are the same under a norm."""
        stored, keys = self.backend.lim.pages.of_layer(layer).keys, self.pool.get_key_buffer(layer)
        k_scale = 1.0 if self.k_scales is None else self.k_scales[layer]
        complete = 0
        for row in (1, 2):
            for first in range(0, self.lens[row] - RULE.block + 1, RULE.block):
                places = torch.arange(first, first + RULE.block)
                slots = self.table[row, places].long()
                bare = rope(keys.double()[slots] * k_scale, RULE, places, back=True)
                expected = gate_key(self.published, bare, first).float()
                torch.testing.assert_close(stored[int(slots[0]) // RULE.block], expected, rtol=1e-4, atol=1e-4)
                complete += 1
        return complete


@pytest.mark.parametrize("page_size", [16, 64])
def test_keys_follow_prefills_chunks_mixed_and_decode_steps(page_size):
    world = GatedWorld(page_size)
    for tokens, mode, how in EVERY_KIND:
        world.step(tokens, mode, **how)
        world.check(1)
        assert world.check() == sum(length // RULE.block for length in world.lens)


def test_a_block_s_next_owner_makes_its_key_anew():
    world = GatedWorld(16)
    world.step({1: 40, 2: 40}, EXTEND)
    # The first request is gone, and the second gets its pages in another order.
    world.table[2], world.lens = world.table[1].view(-1, RULE.block).flip(0).flatten(), [0, 0, 0]
    world.step({2: 100}, EXTEND)
    for _ in range(28):
        world.step({2: 1}, DECODE)
    assert world.check() == 8


def test_who_shares_a_prefix_reads_its_keys_and_writes_none_of_them():
    world = GatedWorld(16)
    world.step({1: 64}, EXTEND)
    before = world.backend.lim.pages.of_layer(2).keys.clone()
    # The second request has the first one's blocks, as a radix cache gives them, and goes on behind them.
    world.table[2, :64], world.lens[2] = world.table[1, :64], 64
    world.step({2: 32}, EXTEND)
    after = world.backend.lim.pages.of_layer(2).keys
    changed = (after != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(int(world.table[2, place]) // RULE.block for place in (64, 80))
    assert world.check() == 4 + 6


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("lens", [(83, 46), (80, 48), (33, 15)], ids=str)
@pytest.mark.parametrize("how", [{}, {"k_scales": K_SCALES, "published": WITHOUT_NORM}], ids=["float32", "fp8"])
def test_rows_that_are_learnt_whole_have_the_keys_that_their_steps_made(page_size, lens, how):
    world = GatedWorld(page_size, **how)
    world.step({1: lens[0] - 9, 2: lens[1] - 9}, EXTEND)
    for _ in range(9):
        world.step({1: 1, 2: 1}, DECODE)
    keys = [world.backend.lim.pages.of_layer(layer).keys for layer in range(3)]
    by_steps = [of_layer.clone() for of_layer in keys]
    for of_layer in keys:
        of_layer.fill_(float("nan"))
    # What lies behind a row's tokens belongs to others; a padded row has none.
    slots = world.table[[2, 0, 1], :100].clone()
    for row, length in enumerate((lens[1], 0, lens[0])):
        slots[row, length:] = RULE.block - 1
    world.backend.lim.pages.learn_rows(slots, torch.tensor([lens[1], 0, lens[0]]))
    assert world.check(0) == world.check(1) == sum(length // RULE.block for length in lens)
    for of_layer, expected in zip(keys, by_steps, strict=True):
        made = ~of_layer.isnan().flatten(1).any(1)
        assert made.sum() == sum(length // RULE.block for length in lens), "keys of blocks that are not complete"
        torch.testing.assert_close(of_layer[made], expected[made], rtol=1e-5, atol=1e-6)


def test_rows_shorter_than_a_block_have_no_key():
    world = GatedWorld(16)
    world.step({1: 7}, EXTEND)
    world.backend.lim.pages.learn_rows(world.table[[1], :8], torch.tensor([7]))
    assert world.backend.lim.pages.of_layer(2).keys.count_nonzero() == 0


def test_a_scale_that_is_loaded_later_is_the_one_that_keys_are_read_by():
    world = GatedWorld(16, k_scales=(1.0, 1.0, 1.0), published=WITHOUT_NORM)
    world.step({1: 16}, EXTEND)
    pages = world.backend.lim.pages
    pages._attentions[1].k_scale_float = 4.0
    before = pages.of_layer(1).keys.clone()
    pages.learn_rows(world.table[[1], :16], torch.tensor([16]))
    torch.testing.assert_close(pages.of_layer(1).keys, 4 * before)


def test_learning_rows_asks_the_device_for_nothing(monkeypatch):
    """Tensors without memory know their sizes alone."""
    asked = []
    monkeypatch.setattr(gate_store, "gate_keys", lambda blocks, keys, *written, k_scale: asked.append(written))
    keys = torch.zeros(400, KV_HEADS, DIM, device="meta")
    pool = SimpleNamespace(size=384, page_size=16, get_key_buffer=lambda layer: keys)
    attention = SimpleNamespace(layer_id=0, k_scale=None)
    gates, turned = {0: PUBLISHED.as_operand("meta")}, {0: Rotation(angles(DIM, 256, 1.0))}
    store = GateStore(pool, gates, turned, {0: attention}, RULE.block)
    lens = torch.zeros(3, dtype=torch.int64, device="meta")
    store.learn_rows(torch.zeros(3, 100, dtype=torch.int32, device="meta"), lens)
    ((slots, positions),) = asked
    assert slots.shape == positions.shape == (3 * 6,) and slots.dtype == positions.dtype == torch.int64


def test_what_the_keys_take_is_known_and_other_layers_have_none():
    pages = GatedWorld(16).backend.lim.pages
    blocks = -(-(20 * 16 + 16) // 16)
    assert pages.nbytes == 3 * blocks * KV_HEADS * RULE.width * 4
    assert pages.of_layer(3) is None


def test_padding_alone_makes_no_key():
    world = GatedWorld(16)
    world.step({1: 20}, EXTEND)
    before = world.backend.lim.pages.of_layer(2).keys.clone()
    world.step({0: 1}, DECODE)
    assert torch.equal(world.backend.lim.pages.of_layer(2).keys, before)


@pytest.mark.parametrize("threshold", [None, 0.22])
def test_a_step_s_counters_are_what_its_layers_read(threshold, monkeypatch):
    """With a threshold sets of layers and heads differ in size, and each layer is counted for itself."""
    world, read = GatedWorld(16, budget=48, gate_threshold=threshold), []
    attend = layer_module.attend

    def counted(chosen, layer):
        if chosen.ends.dim() == 2:
            read.append(chosen.ends.clone())
        return attend(chosen, layer)

    monkeypatch.setattr(layer_module, "attend", counted)
    world.step({1: 90, 2: 75}, EXTEND)
    for _ in range(5):
        world.step({1: 1, 2: 1}, DECODE)
    # Heads share a layer evenly, and what remains of a row is rounded down to a whole token.
    if threshold is None:
        expected = sum(int(ends.sum()) // KV_HEADS for ends in read)
        assert all((ends[:, :1] == ends).all() for ends in read)
    else:
        expected = sum(int(row.sum()) // KV_HEADS for ends in read for row in ends)
        assert any((ends[:, :1] != ends).any() for ends in read), "the threshold left all sets as large"
        assert len({tuple(ends.flatten().tolist()) for ends in read[:3]}) > 1, "all layers chose as much"
    assert len(read) == 5 * 3 and world.backend.lim.counters.read()["tokens_attended"] == expected
