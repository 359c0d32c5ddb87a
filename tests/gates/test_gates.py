"""Are gates read as their authors publish them, and is what cannot be served named before weights load?"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from benchmarks.random_gates import drawn, write
from lim_kernels.block_gates import Rotation
from sgl_lim.gates import GateConfig, GateError, find, load_gates, read_config, save_gates
from sgl_lim.gates.config import pools_of
from sgl_lim.gates.rotation import gate_rotation, plain_table
from sgl_lim.gates.weights import ModelShape, of_heads, with_rotation
from sgl_lim.methods import SeerAttention
from sgl_lim.settings.config import configure
from sgl_lim.settings.gate_problems import gate_problems
from support.gate_oracle import THETA, GateRule, angles

SHAPE = ModelShape(layers=2, heads=6, kv_heads=3, head_dim=64)
PUBLIC = "SeerAttention/SeerAttention-Decode-Qwen3-4B-AttnGates"
ASK_HUB = "SGL_LIM_PUBLIC_GATES"


def config_of(**change) -> GateConfig:
    plain = {
        "block": 16,
        "width": 64,
        "pools": ("max", "min", "avg"),
        "query": "Qproj",
        "norm": True,
        "rotate": True,
        "start_layer": 0,
        "base_model": "some/model",
        "model": {"model_type": "qwen3", "hidden_size": 384},
    }
    return GateConfig(**{**plain, **change})


def written(folder, **change) -> str:
    config = config_of(**change)
    save_gates(folder, config, drawn(config, SHAPE, seed=1))
    return str(folder)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pools": ("min", "avg"), "norm": False, "rotate": False, "start_layer": 1},
        {"query": "Qavgproj", "width": 128, "block": 32},
        {"query": "Qavg", "pools": ("avg",)},
    ],
)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_what_is_saved_is_read(tmp_path, change, form):
    path, config = written(tmp_path, **change), config_of(**change)
    if form == "safetensors":
        state = torch.load(tmp_path / "attn_gate_weights.pth", weights_only=True)
        save_file(state, tmp_path / "attn_gate_weights.safetensors")
        (tmp_path / "attn_gate_weights.pth").unlink()
    assert read_config(path) == config
    gates, parts = load_gates(path, SHAPE, torch.bfloat16), drawn(config, SHAPE, seed=1)
    assert len(gates) == SHAPE.layers
    for gate, own in zip(gates, parts, strict=True):
        assert torch.equal(gate.key, own["linear_k"].bfloat16()) and gate.pools == config.pools
        assert (gate.query_norm is None) == (not config.norm)
        if config.norm:
            assert torch.equal(gate.query_norm, own["qnorm"].bfloat16())
        # Every way to pool query heads is a projection of each of them.
        q = torch.randn(SHAPE.kv_heads, SHAPE.group, SHAPE.head_dim)
        joined = torch.einsum("hi,hio->ho", q.flatten(1), gate.query.float())
        if config.query == "Qproj":
            expected = torch.einsum("hgi,hgio->ho", q, own["linear_q"].bfloat16().float())
        elif config.query == "Qavgproj":
            expected = torch.einsum("hi,hio->ho", q.mean(1), own["linear_q"].bfloat16().float())
        else:
            expected = q.mean(1)
        torch.testing.assert_close(joined, expected, rtol=2e-2, atol=2e-2)


def test_the_published_names_and_sizes(tmp_path):
    """Of Qwen3-8B's gates one layer: the file that is published for 36 layers has 66.1 MB."""
    model = tmp_path / "model"
    model.mkdir()
    values = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps({**values, "hidden_size": 4096}))
    write(model, tmp_path / "gates")
    state = torch.load(tmp_path / "gates" / "attn_gate_weights.pth", weights_only=True)
    prefix = "model.layers.0.self_attn.attn_gate.attngate_"
    assert {name.removeprefix(prefix): list(weight.shape) for name, weight in state.items()} == {
        "linear_q.weight": [8, 4, 128, 128],
        "linear_k.weight": [8, 384, 128],
        "qnorm.weight": [128],
        "knorm.weight": [128],
    }
    assert round(36 * sum(weight.nbytes for weight in state.values()) / 1e6, 1) == 66.1


def test_a_rank_has_the_gates_of_its_kv_heads(tmp_path):
    gate = load_gates(written(tmp_path), SHAPE, torch.float32)[0]
    part = of_heads(gate, 1, 2)
    assert torch.equal(part.query, gate.query[1:]) and torch.equal(part.key, gate.key[1:])
    rotation = Rotation(plain_table(1e4, 64, 8))
    assert with_rotation(part, rotation).rotation is rotation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seerattn_k_seq_pooling_type": None}, "no seerattn_k_seq_pooling_type.*gates for prefill are not served"),
        ({"seerattn_decode": False}, "gates for prefill are not served"),
        ({"seerattn_k_seq_pooling_type": "Kmean"}, "'Kmean': expected K and some of max, min, avg"),
        ({"seerattn_gate_block_size": 48}, "seerattn_gate_block_size 48: expected one of 16, 32, 64"),
        ({"seerattn_gate_hidden_size": 96}, "seerattn_gate_hidden_size 96: expected one of 64, 128, 256"),
        ({"seerattn_q_head_pooling_type": "Qorig"}, "'Qorig': expected one of Qproj, Qavgproj, Qavg"),
        ({"seerattn_start_layer": "two"}, "seerattn_start_layer must be a whole number, got 'two'"),
    ],
)
def test_what_a_config_says_that_is_not_served(tmp_path, change, reason):
    path = written(tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(GateError, match=reason):
        read_config(path)
    (problem,) = configure(method="seerattention", gates=path).problems()
    assert problem.startswith("--lim-gates ")


def test_pools_have_the_order_of_the_class_name():
    assert pools_of("Kmaxminavg") == ("max", "min", "avg") and pools_of("Kavg") == ("avg",)
    for wrong in ("maxmin", "K", "Kmaxmax"):
        with pytest.raises(GateError, match="expected K and some of"):
            pools_of(wrong)


def test_folders_that_hold_no_gates(tmp_path, monkeypatch):
    with pytest.raises(GateError, match=r"has no config\.json; give a folder with config\.json"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(GateError, match=r"neither attn_gate_weights\.pth nor"):
        find(str(tmp_path))
    torch.save({}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(GateError, match="expected a JSON object, got list"):
        read_config(str(tmp_path))
    with pytest.raises(GateError, match="is a file; give a folder"):
        find(str(tmp_path / "config.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GateError, match="neither a folder nor to be had from the hub"):
        find("nobody/has-such-gates")
    path = written(tmp_path / "gates")
    (tmp_path / "gates" / "attn_gate_weights.pth").write_bytes(b"none")
    with pytest.raises(GateError, match="cannot be read as tensors"):
        load_gates(path, SHAPE, torch.float32)


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    path = written(tmp_path)

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Runs()}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(GateError, match="cannot be read as tensors"):
        load_gates(path, SHAPE, torch.float32)
    assert not (tmp_path / "ran").exists()


def model_config(**change):
    """What is asked of SGLang's model config."""
    text = PretrainedConfig(hidden_size=384)
    text.model_type = change.pop("model_type", "qwen3")
    plain = {
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "get_total_num_kv_heads": lambda: SHAPE.kv_heads,
        "head_dim": SHAPE.head_dim,
        "hf_text_config": text,
        "model_path": "some/model",
        "is_multimodal": False,
    }
    return SimpleNamespace(**{**plain, **change})


@pytest.mark.parametrize(
    ("change", "tp_size", "reasons"),
    [
        ({}, 1, ()),
        ({}, 3, ()),
        ({"model_path": "SOME/Model"}, 1, ()),
        ({"model_path": "/hub/models--some--model/snapshots/abc"}, 1, ()),
        ({}, 6, ("--tp-size 6", "use --tp-size 3 or less")),
        ({"num_hidden_layers": 3}, 1, ("4 of 12 tensors are missing",)),
        ({"num_hidden_layers": 1}, 1, ("a model of 1 layers has no use for",)),
        ({"num_attention_heads": 12}, 1, ("12 query heads and 3 KV heads of 64", "[3, 4, 64, 64]")),
        ({"get_total_num_kv_heads": lambda: 2}, 1, ("6 query heads and 2 KV heads",)),
        ({"head_dim": 32}, 1, ("3 KV heads of 32",)),
        ({"model_type": "llama"}, 1, ("trained for model_type qwen3, and the model has llama",)),
        ({"model_path": "some/other"}, 1, ("they were trained for some/model, and the model is some/other",)),
        ({"model_path": "/hub/models--a--b/snapshots/c"}, 1, ("they were trained for some/model",)),
        ({"is_multimodal": True}, 1, ("more than one position", "quest")),
    ],
)
def test_gates_of_another_model_are_refused_by_name(tmp_path, change, tp_size, reasons):
    method = SeerAttention(gates=written(tmp_path))
    found = gate_problems(method, model_config(**change), tp_size)
    assert bool(found) == bool(reasons)
    assert all(any(reason in one for one in found) for reason in reasons)
    assert all(one.startswith(("--lim-gates ", "--tp-size ")) for one in found)


def test_a_folder_of_another_name_is_served_with_a_warning(tmp_path, caplog):
    method, served = SeerAttention(gates=written(tmp_path / "gates")), tmp_path / "finetuned"
    served.mkdir()
    assert gate_problems(method, model_config(model_path=str(served)), 1) == []
    assert "the gates were trained for some/model" in caplog.text


def test_the_method_needs_gates_and_has_their_block_and_layers(tmp_path):
    (problem,) = configure(method="seerattention").problems()
    assert "--lim-gates" in problem and "quest" in problem
    method = configure(method="seerattention", gates=written(tmp_path, block=32, start_layer=2), budget=128).build()
    assert method.page == 32 and method.conflicts() == [] and method.per_kv_head and method.sizes_vary
    assert [role.value for role in method.layer_roles(4)] == ["dense", "dense", "own", "own"]
    assert method.flags_that_follow_writes() == ["--lim-method seerattention"] and not method.sets_differ
    (problem,) = SeerAttention(gates=method.gates, budget=40).conflicts()
    assert "take a multiple of 32, such as 64" in problem
    assert SeerAttention(gates=method.gates, gate_threshold=0.1).sets_differ


@pytest.mark.parametrize("value", [0.0, 1.0, "much"])
def test_a_threshold_is_a_share(tmp_path, value):
    (problem,) = configure(method="seerattention", gates=written(tmp_path), gate_threshold=value).problems()
    assert problem.startswith("--lim-gate-threshold must lie between 0 and 1")


def test_gates_rotate_as_the_model_over_their_width():
    own = Rotation(angles(64, 32, 1.0))
    assert torch.equal(gate_rotation(config_of(), 64, own, THETA).table, own.table)
    assert gate_rotation(config_of(rotate=False), 64, own, THETA) is None
    wider = gate_rotation(config_of(width=128), 64, own, THETA)
    torch.testing.assert_close(wider.table, angles(128, 32, 1.0))
    with pytest.raises(GateError, match="seerattn_gate_hidden_size 128: the model's heads have 64 elements"):
        gate_rotation(config_of(width=128), 64, own, None)
    assert GateRule(1, 1, 64, 128, 16).turned_dims == 64


@pytest.mark.skipif(ASK_HUB not in os.environ, reason=f"needs the hub; set {ASK_HUB}=1 to ask it")
def test_the_public_gates_of_qwen3_4b_load():
    config = read_config(PUBLIC)
    assert (config.block, config.width, config.pools, config.query) == (64, 128, ("max", "min", "avg"), "Qproj")
    gates = load_gates(PUBLIC, ModelShape(layers=36, heads=32, kv_heads=8, head_dim=128), torch.bfloat16)
    assert len(gates) == 36 and all(gate.query.isfinite().all() and gate.key.isfinite().all() for gate in gates)
