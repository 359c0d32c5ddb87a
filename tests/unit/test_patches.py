"""The hooks: their targets exist in this SGLang, and one that SGLang did not apply is loud."""

import importlib
import pkgutil

import pytest

import lim_patches
from lim_patches import registry

SEAMS = ("cli_flags", "refuse_before_weights", "row_generations", "server_info", "triton_on_cpu")


@pytest.mark.parametrize("name", SEAMS)
def test_targets_exist_and_the_seam_says_why(name):
    seam = importlib.import_module(f"lim_patches.{name}")
    for word in ("Symptom:", "Cause:", "Versions:", "Remove when:"):
        assert word in seam.__doc__
    for target in seam.TARGETS:
        module, _, attribute = target.rpartition(".")
        assert hasattr(pkgutil.resolve_name(module), attribute), target


def test_every_seam_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(lim_patches.__path__)}
    assert modules - {"registry"} == set(SEAMS)


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
