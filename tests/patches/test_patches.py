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


def test_slots_of_drafts_are_written_row_by_row():
    from lim_patches.slots_on_cpu import assign

    table = torch.zeros(4, 6, dtype=torch.int32)
    start, end = torch.tensor([1, 3, 0], dtype=torch.int32), torch.tensor([4, 3, 2], dtype=torch.int32)
    assign(None, torch.tensor([2, 0, 3]), table, start, end, torch.tensor([11, 12, 13, 14, 15]), 3)
    assert table.tolist() == [[0] * 6, [0] * 6, [0, 11, 12, 13, 0, 0], [14, 15, 0, 0, 0, 0]]


def test_rows_have_room_for_what_two_rounds_reserve(monkeypatch):
    from sglang.srt.mem_cache import allocation_sizing

    from lim_patches.row_room import at_least_what_is_reserved

    monkeypatch.setattr(allocation_sizing, "get_alloc_reserve_per_decode", lambda *_: 20)
    assert at_least_what_is_reserved(14) == 20
    assert at_least_what_is_reserved(30) == 30


@pytest.mark.parametrize(
    ("stop_at", "expected"),
    [
        pytest.param(3, ("stop", 3), id="before"),
        pytest.param(5, ("length", 5), id="with-the-last"),
        pytest.param(6, ("length", 5), id="behind"),
        pytest.param(None, ("length", 5), id="never"),
    ],
)
def test_a_run_ends_at_its_first_stop_or_its_length(stop_at, expected):
    from lim_patches.stops_before_length import look_for_stops_first

    req = SimpleNamespace(
        sampling_params=SimpleNamespace(max_new_tokens=5),
        output_ids=[1] * 7,
        finished_reason=None,
        finished_len=None,
        to_finish=None,
    )
    req.finished = lambda: req.finished_reason is not None

    def original(req, new_accepted_len):
        assert len(req.output_ids) < req.sampling_params.max_new_tokens
        if stop_at is not None:
            req.finished_reason, req.finished_len = SimpleNamespace(to_json=lambda: {"type": "stop"}), stop_at

    look_for_stops_first(original, req, 4)
    assert (req.finished_reason.to_json()["type"], req.finished_len) == expected
    assert req.sampling_params.max_new_tokens == 5
