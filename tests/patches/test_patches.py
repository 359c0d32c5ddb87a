"""The hooks: their targets exist in this SGLang, and one that SGLang did not apply is loud."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention import attention_registry

import lim_patches
from lim_patches import registry
from sgl_lim import plugin

SEAMS = sorted({module.name for module in pkgutil.iter_modules(lim_patches.__path__)} - {"registry"})


@pytest.mark.parametrize("name", SEAMS)
def test_targets_exist_and_the_seam_says_why(name):
    seam = importlib.import_module(f"lim_patches.{name}")
    for word in ("Symptom:", "Cause:", "Versions:", "Remove when:"):
        assert word in seam.__doc__
    for target in seam.TARGETS:
        module, _, attribute = target.rpartition(".")
        assert hasattr(pkgutil.resolve_name(module), attribute), target


def test_the_plugin_uses_every_seam(monkeypatch):
    used = []
    monkeypatch.setattr(lim_patches, "use", lambda seam, **callbacks: used.append(seam.__name__))
    monkeypatch.setattr(server_args, "add_attention_backend_choices", lambda names: None)
    monkeypatch.setattr(attention_registry, "register_attention_backend", lambda name: lambda make: make)
    plugin.plug()
    assert sorted(used) == [f"lim_patches.{name}" for name in SEAMS]


def test_a_hook_that_was_not_applied_is_loud(monkeypatch):
    monkeypatch.setattr(registry, "_requested", ["sglang.srt.nowhere.Nothing.at_all"])
    with pytest.raises(RuntimeError, match=r"did not apply the hooks on sglang\.srt\.nowhere\.Nothing\.at_all"):
        lim_patches.verify()


def test_a_seam_that_this_release_does_not_need_is_left_out(monkeypatch):
    from lim_patches import triton_on_cpu

    monkeypatch.setattr(registry, "_requested", [])
    monkeypatch.setattr(triton_on_cpu, "applies", lambda version: False)
    registry.use(triton_on_cpu)
    assert registry.installed_targets() == ()


def test_a_grammar_s_mask_is_applied_bit_by_bit():
    from lim_patches.grammar_on_cpu import allocate, apply

    mask, logits = allocate(None, 70, 2), torch.zeros(2, 70, dtype=torch.bfloat16)
    assert mask.shape == (2, 3) and not mask.is_pinned()
    apply(None, None, logits=logits, vocab_mask=mask)
    assert logits.count_nonzero() == 0, "at first everything is allowed"
    mask[0] = torch.tensor([1 << 4, -(1 << 31), 0], dtype=torch.int32)
    apply(None, None, logits=logits, vocab_mask=mask)
    assert (logits[0] == 0).nonzero().view(-1).tolist() == [4, 63] and logits[1].count_nonzero() == 0


def test_discarded_results_are_those_that_sglang_skips(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from lim_patches import discarded_results

    hooks, told = [], []
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.append(hook))
    discarded_results.register(on_discarded=lambda rows, places: told.append((rows, places)))
    (before,) = hooks
    # SGLang skips exactly these: `(req.finished() or req.is_retracted)`, and only with overlap.
    requests = [
        SimpleNamespace(finished=lambda done=done: done, is_retracted=retracted)
        for done, retracted in ((False, False), (True, False), (False, True), (False, False))
    ]
    batch = SimpleNamespace(reqs=requests, req_pool_indices="rows")
    before(SimpleNamespace(enable_overlap=True), batch, "result")
    before(SimpleNamespace(enable_overlap=False), batch, "result")
    before(SimpleNamespace(enable_overlap=True), SimpleNamespace(reqs=requests[:1]), "result")
    assert told == [("rows", [1, 2])]
