"""What a start says: one line, remarks before it, once a server; and the same in `/server_info`."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sgl_lim.methods import HeadsOfRank
from sgl_lim.serving import metrics
from sgl_lim.serving.state import agreed
from sgl_lim.serving.tally import Tally
from sgl_lim.settings.config import LimConfig
from sgl_lim.settings.layers import Layers
from support.fake_backend import build

MEASURED = {
    "agreement": 0.94512,
    "agreement_interval": [0.93, 0.96],
    "tokens": 4000,
    "one_key": {"items": 40, "dense_right": 1.0},
    "beside": {"2,12": {"tokens": 4000}},
    "kept_on": "2026-01-31",
}
LAYERS = Layers((1,), "set", "the calibration kept in x.json", MEASURED, ("first remark", "second remark"))


@pytest.fixture
def lim(monkeypatch):
    """The state of a backend whose layers were measured; nothing of it stays for other tests."""
    for name in ("lim", "tally", "drawn_acceptance", "model_name", "enabled"):
        monkeypatch.setattr(metrics._State, name, getattr(metrics._State, name))
    state = build(torch.zeros(2, 64, dtype=torch.int32), selection_attends="set").lim
    state.layers = LAYERS
    return state


def group_of(monkeypatch, **more):
    group = SimpleNamespace(**more)
    monkeypatch.setattr("sglang.srt.distributed.parallel_state.get_attn_tp_group", lambda: group)


def announced(lim, monkeypatch, caplog, rank):
    group_of(monkeypatch, rank_in_group=rank)
    args = SimpleNamespace(served_model_name="m", model_path="m", enable_metrics=False)
    with caplog.at_level(logging.INFO):
        metrics.announce(lim, SimpleNamespace(server_args=args))
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_the_first_rank_says_it_once_and_the_others_nothing(lim, monkeypatch, caplog):
    assert announced(lim, monkeypatch, caplog, rank=1) == []
    first, second, line = announced(lim, monkeypatch, caplog, rank=0)
    assert (first, second) == (("WARNING", "sgl-lim: first remark"), ("WARNING", "sgl-lim: second remark"))
    assert line[0] == "INFO" and "selection layers 1, selection attends set" in line[1]
    figures = "agreement 0.9451, tokens 4000, one key items 40 dense right 1, kept on 2026-01-31"
    assert f"selection layers from the calibration kept in x.json ({figures}), layers" in line[1]


def test_server_info_has_all_that_was_measured(lim, monkeypatch, caplog):
    announced(lim, monkeypatch, caplog, rank=0)
    block = metrics.describe()
    assert block["selection_layers"] == [1] and block["selection_attends"] == "set"
    assert block["selection_layers_from"] == LAYERS.source and block["selection_layers_measured"] == MEASURED


def test_layers_that_nobody_measured_have_no_figures(lim):
    lim.layers = Layers((1,), "set", "spaced default")
    assert "selection layers from spaced default, layers" in metrics.summary(lim)
    assert metrics.settings(lim)["selection_layers_measured"] is None


def test_ranks_take_the_first_one_s_layers(monkeypatch):
    sent = []

    def broadcast_object(layers, src):
        sent.append((layers, src))
        return LAYERS

    group_of(monkeypatch, broadcast_object=broadcast_object)
    own = Layers((2,), "context", "preset some")
    assert agreed(own, HeadsOfRank(first=2, own=2, all=4)) == LAYERS and sent == [(own, 0)]
    assert agreed(own, HeadsOfRank(first=0, own=4, all=4)) == own and len(sent) == 1


@pytest.mark.parametrize("drawn", [None, 0.9])
def test_a_lossless_server_says_whose_answers_it_gives(lim, monkeypatch, caplog, drawn):
    announced(lim, monkeypatch, caplog, rank=0)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        metrics.announce_lossless(Tally(), [3, 6], LimConfig(drawn_acceptance=drawn))
    (record,) = caplog.records
    block = metrics.describe()
    if drawn is None:
        assert record.levelname == "INFO" and "answers are the dense model's; up to 6 tokens" in record.getMessage()
        assert "answers_are_wrong" not in block
    else:
        assert record.levelname == "WARNING" and "ANSWERS ARE WRONG" in record.getMessage()
        assert (block["answers_are_wrong"], block["drawn_acceptance"]) == (True, 0.9)
