"""Are gate keys those of the keys in SGLang's pool, whatever step of whatever kind completed their block?"""

from dataclasses import replace

import pytest
import torch

from lim_kernels.block_gates import Rotation
from sgl_lim.serving import layer as layer_module
from sgl_lim.serving.gate_store import GateStore
from support.fake_backend import DECODE, EXTEND
from support.gate_oracle import GateRule, angles, draw_gate, gate_key, rope
from support.gates import gates_for
from support.writing_world import DIM, EVERY_KIND, HEADS, KV_HEADS, World

RULE = GateRule(HEADS, KV_HEADS, DIM, width=16, block=16)
PUBLISHED = draw_gate(RULE, torch.Generator().manual_seed(9), torch.float32)


class GatedWorld(World):
    """Every layer chooses by gates of blocks of 16."""

    def __init__(self, page_size, **config):
        gates = gates_for(3, HEADS, KV_HEADS, DIM)
        super().__init__(page_size, self.store, method="seerattention", gates=gates, **config)

    def store(self, pool):
        gate, turned = PUBLISHED.as_operand(), Rotation(angles(DIM, 256, 1.0))
        layers = {0: gate, 1: gate, 2: replace(gate, key=2 * gate.key)}
        return GateStore(pool, layers, dict.fromkeys(layers, turned), RULE.block)

    def check(self, layer=2):
        """The keys of all complete blocks are the paper's; twice the weights are the same under a norm."""
        stored, keys = self.backend.lim.pages.of_layer(layer).keys, self.pool.get_key_buffer(layer)
        complete = 0
        for row in (1, 2):
            for first in range(0, self.lens[row] - RULE.block + 1, RULE.block):
                places = torch.arange(first, first + RULE.block)
                slots = self.table[row, places].long()
                bare = rope(keys[slots].double(), RULE, places, back=True)
                expected = gate_key(PUBLISHED, bare, first).float()
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
