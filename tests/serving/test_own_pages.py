"""Does each rank get the gates of its KV heads, and is a model's rotation found or its lack named?"""

from types import SimpleNamespace

import pytest
import torch

from sgl_lim.gates import load_gates
from sgl_lim.gates.weights import ModelShape
from sgl_lim.methods import HeadsOfRank, Quest, Role, SeerAttention, Window
from sgl_lim.serving.gate_store import GateStore
from sgl_lim.serving.key_scales import UnknownScale, attention_layers, key_scale
from sgl_lim.serving.model_rotation import UnknownRotation, check_length, rotations_of
from sgl_lim.serving.own_pages import build_pages
from sgl_lim.serving.page_store import PageStore
from support.fake_backend import DIM, HEADS, KV_HEADS, LAYERS, Attention, RotaryEmbedding
from support.gate_oracle import THETA
from support.gates import BLOCK, WIDTH, gates_for

SHAPE = ModelShape(LAYERS, HEADS, KV_HEADS, DIM)


def runner(kv_heads=KV_HEADS, slots=100, model=None):
    """What the builder asks of SGLang's model runner, for a rank that holds so many KV heads."""
    keys = torch.zeros(slots, kv_heads, DIM)
    rotary = RotaryEmbedding()
    return SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(size=slots - BLOCK, page_size=BLOCK, get_key_buffer=lambda layer: keys),
        model_config=SimpleNamespace(dtype=torch.float32, context_len=256),
        model=model or torch.nn.ModuleList(Attention(layer, rotary) for layer in range(LAYERS)),
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_has_the_gates_of_its_kv_heads_and_no_others(ranks):
    path = gates_for(LAYERS, HEADS, KV_HEADS, DIM)
    method, whole = SeerAttention(gates=path), load_gates(path, SHAPE, torch.float32)
    own, held = HEADS // ranks, KV_HEADS // ranks
    for rank in range(ranks):
        heads = HeadsOfRank(first=rank * own, own=own, all=HEADS)
        store = build_pages(method, method.layer_roles(LAYERS), runner(held), heads)
        assert isinstance(store, GateStore)
        for layer in range(LAYERS):
            blocks, part = store.of_layer(layer), slice(rank * held, (rank + 1) * held)
            assert torch.equal(blocks.gate.query, whole[layer].query[part])
            assert torch.equal(blocks.gate.key, whole[layer].key[part])
            assert blocks.keys.shape == (-(-100 // BLOCK), held, WIDTH) and blocks.block == BLOCK
            # The gates are wider than the heads, and rotate by frequencies of their own width.
            assert blocks.gate.rotation.table.shape[1] == WIDTH and blocks.rotation.table.shape[1] == DIM


def test_who_chooses_pages_otherwise_has_bounds_or_nothing():
    heads = HeadsOfRank(first=0, own=HEADS, all=HEADS)
    assert isinstance(build_pages(Quest(), Quest().layer_roles(LAYERS), runner(), heads), PageStore)
    assert build_pages(Window(selection_layers=(1,)), (Role.DENSE,) * LAYERS, runner(), heads) is None


def test_a_model_s_rotation_is_found_beside_its_attention():
    found = rotations_of(runner().model, [0, 2])
    assert sorted(found) == [0, 2] and found[0] is found[2] and found[0].theta == THETA
    assert not found[0].rotation.interleaved and found[0].rotation.table.dtype == torch.float32


def test_scaled_and_interleaved_rotations_are_told_apart():
    class YaRNScalingRotaryEmbedding(RotaryEmbedding):
        is_neox_style = False

    (found,) = rotations_of(torch.nn.ModuleList([Attention(0, YaRNScalingRotaryEmbedding())]), [0]).values()
    assert found.theta is None and found.rotation.interleaved


def test_a_layer_without_such_a_rotation_is_named():
    rotary = RotaryEmbedding()
    with pytest.raises(UnknownRotation, match="layer 1 of ModuleList has no rotary_emb"):
        rotations_of(torch.nn.ModuleList([Attention(0, rotary)]), [0, 1])
    rotary.mrope_section = [1, 1, 2]
    with pytest.raises(UnknownRotation, match="layer 0 rotates by RotaryEmbedding, which is no table of positions"):
        rotations_of(torch.nn.ModuleList([Attention(0, rotary)]), [0])


def test_a_context_beyond_the_rotation_is_refused():
    found = rotations_of(runner().model, [0])[0]
    check_length(found, 256)
    with pytest.raises(UnknownRotation, match="--context-length 256 or less"):
        check_length(found, 257)


def test_the_scale_of_a_layer_s_stored_keys_is_found_in_its_attention():
    model = runner().model
    model[1].attn.k_scale, model[1].attn.k_scale_float = torch.nn.Parameter(torch.tensor(0.5)), 0.5
    found = attention_layers(model, [0, 1])
    assert {layer: key_scale(one) for layer, one in found.items()} == {0: 1.0, 1: 0.5}
    assert found[1] is model[1].attn


def test_a_scale_that_cannot_be_told_is_refused():
    method, heads = SeerAttention(gates=gates_for(LAYERS, HEADS, KV_HEADS, DIM)), HeadsOfRank(0, HEADS, HEADS)
    unread, rotary = runner(), RotaryEmbedding()
    # SGLang's `--quantization-param-path` sets the one and leaves the other as it is.
    unread.model[1].attn.k_scale = 0.5
    with pytest.raises(UnknownScale, match=r"layer 1 stores its keys by a scale.*--kv-cache-dtype auto"):
        build_pages(method, method.layer_roles(LAYERS), unread, heads)
    twice = torch.nn.ModuleList([Attention(0, rotary), Attention(0, rotary)])
    for model, count in ((twice, 2), (torch.nn.ModuleList(), 0)):
        with pytest.raises(UnknownScale, match=f"layer 0 of ModuleList should have one .* and has {count}"):
            attention_layers(model, [0])
