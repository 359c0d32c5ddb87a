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


def test_no_memory_is_pinned_where_nothing_reads_it():
    from lim_patches.lora_on_cpu import unpinned

    def make(one, *, other):
        made = torch.tensor([one], pin_memory=True), torch.zeros(2, dtype=torch.int32, pin_memory=True)
        return (*made, other.pin_memory())

    other = torch.ones(3)
    found = unpinned(make, 7, other=other)
    assert not any(tensor.is_pinned() for tensor in found)
    assert found[0].tolist() == [7] and found[1].dtype == torch.int32 and found[2] is other


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_a_host_cache_gives_back_what_it_took(layout):
    from lim_patches.host_cache_on_cpu import back_up, load_layer

    pool = SimpleNamespace(k_buffer=list(torch.randn(3, 20, 2, 4)), v_buffer=list(torch.randn(3, 20, 2, 4)))
    # In either layout SGLang keeps a view of each layer, whose first dimension is the token.
    memory = torch.zeros(2, 3, 32, 2, 4) if layout == "layer_first" else torch.zeros(2, 32, 3, 2, 4).transpose(1, 2)
    host = SimpleNamespace(layout=layout, k_data_refs=list(memory[0]), v_data_refs=list(memory[1]))
    there, here, later = torch.tensor([5, 9, 30]), torch.tensor([1, 2, 19]), torch.tensor([7, 3, 4])
    wanted = [(k[here].clone(), v[here].clone()) for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)]
    back_up(None, host, pool, there, here, "kernel")
    for layer, (k, v) in enumerate(wanted):
        load_layer(None, host, pool, there, later, layer, "kernel")
        assert torch.equal(pool.k_buffer[layer][later], k) and torch.equal(pool.v_buffer[layer][later], v)
    with pytest.raises(ValueError, match="on a CPU use layer_first"):
        back_up(None, SimpleNamespace(layout="page_head"), pool, there, here, "kernel")


def test_the_rows_of_a_batch_are_told_before_it_runs(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from lim_patches import rows_on_host

    hooks, told = [], []
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.append(hook))
    rows_on_host.register(on_batch=lambda pool, rows: told.append((pool, rows)))
    (after,) = hooks
    runner = SimpleNamespace(req_to_token_pool="pool")
    after("forward batch", type, SimpleNamespace(req_pool_indices_cpu="rows"), runner, capture_hidden_mode=None)
    assert told == [("pool", "rows")]
