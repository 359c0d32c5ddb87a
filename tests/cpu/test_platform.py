"""When the CPU platform is offered to SGLang."""

import os
from pathlib import Path

import pytest
import torch

from sgl_lim.cpu import platform

CHAIN_TRACER = Path(__file__).parents[2] / "models" / "chain-tracer"


@pytest.fixture
def _no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)


@pytest.mark.usefixtures("_no_accelerator")
def test_offered_without_an_accelerator():
    assert platform.activate() == "sgl_lim.cpu.platform_class.PlainCpuPlatform"


@pytest.mark.usefixtures("_no_accelerator")
def test_not_offered_with_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert platform.activate() is None


@pytest.mark.usefixtures("_no_accelerator")
def test_not_offered_where_sglang_s_own_cpu_engine_is_asked_for(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


@pytest.mark.usefixtures("_no_accelerator")
def test_the_class_is_an_out_of_tree_platform_that_runs_native_operators():
    import pkgutil

    from sglang.srt.platforms.interface import SRTPlatform

    chosen = pkgutil.resolve_name(platform.activate())()
    assert isinstance(chosen, SRTPlatform) and chosen.is_out_of_tree()
    assert chosen.get_dispatch_key_name() == "native"
    assert chosen.get_default_attention_backend() == "torch_native"
    assert not chosen.is_pin_memory_available()


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, ("passive", "10000")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7")),
    ],
    ids=["none", "policy", "spins"],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="SGLang runs on another platform here")
def test_threads_of_workers_soon_sleep_while_they_wait_unless_the_user_chose(monkeypatch, own, wanted):
    from sglang.srt.server_args import ServerArgs

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, own.get(name, "to be restored"))
        if name not in own:
            monkeypatch.delenv(name)
    arguments = ServerArgs(model_path=str(CHAIN_TRACER), device="cpu", attention_backend="torch_native")
    if hasattr(arguments, "resolve_once"):  # 0.5.23: the launcher calls it before it spawns
        arguments.resolve_once()
    # The workers, spawned later, inherit them.
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == wanted
