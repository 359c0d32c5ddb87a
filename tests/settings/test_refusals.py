"""Reasons to refuse, told all at once; servers that are refused for real are in tests/served."""

from types import SimpleNamespace

import pytest
from sglang.srt.configs.model_config import AttentionArch
from transformers import PretrainedConfig

from sgl_lim.settings import refusals
from sgl_lim.settings.config import RefusedConfig, configure
from sgl_lim.settings.refusals import (
    check_before_weights,
    check_pool,
    decodes_sparsely,
    warn_if_always_dense,
    warn_if_unused,
)

MODEL = {
    "attention_arch": AttentionArch.MHA,
    "is_encoder_decoder": False,
    "is_hybrid_swa": False,
    "sliding_window_size": None,
    "context_len": 8192,
    "hf_config": PretrainedConfig(),
    "hf_text_config": PretrainedConfig(),
    "linear_attn_registry_result": None,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "get_total_num_kv_heads": lambda: 2,
    "model_path": "some/model",
}
SERVER = {
    "attention_backend": "lessismore",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "attn_dp_size": 1,
    "pp_size": 1,
    "tp_size": 1,
    "dp_size": 1,
    "enable_dp_attention": False,
    "dcp_size": 1,
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
    "kv_cache_dtype": "auto",
    "speculative_algorithm": None,
    "speculative_draft_attention_backend": None,
    "enable_torch_compile": False,
    "load_format": "auto",
}


def reasons(config=None, device="cpu", **changes) -> list[str]:
    runner = SimpleNamespace(
        model_config=SimpleNamespace(**{k: changes.get(k, v) for k, v in MODEL.items()}),
        server_args=SimpleNamespace(**{k: v for k, v in {**SERVER, **changes}.items() if k not in MODEL}),
        device=device,
    )
    try:
        check_before_weights(config or configure(), runner)
    except RefusedConfig as refused:
        return refused.reasons
    return []


def test_plain_configuration_is_served():
    assert reasons() == [] and reasons(device="cuda") == []
    assert reasons(tp_size=2) == [] and reasons(device="cuda", tp_size=4) == [] == reasons(device="cuda", tp_size=8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_arch": AttentionArch.MLA}, ("MLA", "--attention-backend")),
        ({"is_encoder_decoder": True}, ("encoder-decoder", "--attention-backend")),
        ({"is_hybrid_swa": True}, ("sliding-window", "--attention-backend")),
        ({"sliding_window_size": 4096}, ("sliding-window", "--attention-backend")),
        ({"pp_size": 2}, ("--pp-size 2", "--tp-size")),
        ({"tp_size": 3}, ("--tp-size 3 does not share 8 query heads and 2 KV heads", "use 1 or 2")),
        ({"tp_size": 4}, ("--tp-size 4 does not share 8 query heads and 2 KV heads", "use 1 or 2")),
        ({"device": "cuda", "tp_size": 3}, ("--tp-size 3 does not share", "use 1 or 2 or 4 or 8")),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, ("--enable-dp-attention", "leave the flag out")),
        ({"dcp_size": 2}, ("--dcp-size", "leave it at 1")),
        ({"enable_two_batch_overlap": True}, ("--enable-two-batch-overlap", "leave the flag out")),
        ({"enable_pdmux": True}, ("--enable-pdmux", "leave the flag out")),
        ({"kv_cache_dtype": "fp4_e2m1"}, ("--kv-cache-dtype fp4_e2m1", "fp8_e4m3")),
        (
            {"kv_cache_dtype": "fp8_e4m3", "quantization_param_path": "scales.json"},
            ("--quantization-param-path", "--kv-cache-dtype auto"),
        ),
        (
            {"device": "cuda", "speculative_algorithm": "EAGLE"},
            ("EAGLE", "--speculative-draft-attention-backend"),
        ),
        ({"device": "cuda", "speculative_algorithm": "NGRAM"}, ("NGRAM has no draft model", "leave it out")),
        ({"speculative_algorithm": "NGRAM"}, ("--speculative-algorithm NGRAM: ", "on a CPU leave it out")),
        (
            {"speculative_algorithm": "EAGLE", "speculative_draft_attention_backend": "triton"},
            ("--speculative-algorithm EAGLE: ", "on a CPU leave it out"),
        ),
        ({"enable_torch_compile": True}, ("--enable-torch-compile", "leave the flag out")),
        ({"tp_size": 2, "attn_dp_size": 2}, ("--attn-dp-size", "leave the flag out")),
        ({"enable_lora": True, "lora_backend": "csgmv"}, ("--lora-backend csgmv", "use torch_native")),
        ({"lora_paths": ["a=b"], "lora_backend": "triton"}, ("--lora-backend triton", "use torch_native")),
        ({"enable_hisparse": True}, ("--enable-hisparse", "leave the flag out")),
        (
            {"attention_backend": "triton", "prefill_attention_backend": "lessismore"},
            ("--prefill-attention-backend lessismore", "--decode-attention-backend"),
        ),
        (
            {
                "device": "cuda",
                "speculative_algorithm": "EAGLE",
                "speculative_draft_attention_backend": "lessismore",
            },
            ("EAGLE", "--speculative-draft-attention-backend"),
        ),
        ({"device": "npu"}, ("--device npu", "cuda or cpu")),
        ({"config": configure(selection_layers=(2, 12))}, ("--lim-selection-layers 2,12", "0 to 11")),
        ({"config": configure(dense_backend="fa9")}, ("--lim-dense-backend", "flashinfer")),
        ({"config": configure(dense_backend="fa3")}, ("--lim-dense-backend fa3", "leave it out")),
        (
            {"device": "cuda", "kv_cache_dtype": "fp8_e5m2", "config": configure(dense_backend="fa3")},
            ("--kv-cache-dtype fp8_e5m2", "fp8_e4m3"),
        ),
        ({"device": "cuda", "config": configure(budget=9000)}, ("--lim-budget 9000", "--lim-aggregate max")),
        ({"device": "cuda", "config": configure(dense_backend="torch_native")}, ("torch_native", "leave it out")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_reason_names_flag_and_way_out(changes, named):
    found = reasons(**changes)
    assert any(all(word in reason for word in named) for reason in found), found


KEEPING = {
    "interval": (configure(selection_interval=4), "--lim-selection-interval 4"),
    "early": (configure(early_sets=True), "--lim-early-sets on"),
    "quest": (configure(method="quest"), "--lim-method quest"),
}
"""Settings by which something is kept of KV slots, and the flag that turns each on."""


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_backend": None, "decode_attention_backend": "lessismore"},
        {"attention_backend": "fa3", "decode_attention_backend": "lessismore"},
        {"prefill_attention_backend": "triton"},
    ],
    ids=["decode-alone", "other-prefill-by-default", "other-prefill"],
)
def test_what_is_kept_of_slots_needs_to_see_prefills(name, changes):
    config, flag = KEEPING[name]
    assert reasons(config, page_size=16) == []
    (reason,) = reasons(config, page_size=16, **changes)
    assert flag in reason and "name this backend with --attention-backend" in reason


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize(
    "changes",
    [{"enable_hierarchical_cache": True}, {"enable_lmcache": True}, {"disaggregation_mode": "decode"}],
    ids=lambda changes: next(iter(changes)),
)
def test_kv_may_come_without_a_prefill(name, changes):
    assert reasons(KEEPING[name][0], page_size=16, **changes) == []


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}),
        (1, {"tp_size": 8, "attn_dp_size": 8}),
        (2, {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}),
        (4, {"tp_size": 8, "attn_dp_size": 2}),
    ],
)
def test_groups_of_dp_attention_are_single_gpus(ranks, changes):
    found = reasons(device="cuda", **changes)
    if ranks == 1:
        assert found == [], "heads are not shared either: eight ranks could not share two KV heads"
    else:
        (reason,) = found
        assert f"{ranks} ranks in each of 2 groups" in reason and f"--tp-size {changes['tp_size']}" in reason
    on_a_cpu = reasons(**changes)[0]
    assert "--enable-dp-attention" in on_a_cpu and "on a CPU leave the flag out" in on_a_cpu


@pytest.mark.parametrize("page_size", [None, 1, 8, 24])
def test_quest_needs_pages_of_16(page_size):
    (reason,) = reasons(configure(method="quest"), page_size=page_size)
    assert f"--page-size {page_size or 1}:" in reason and "use --page-size 16" in reason
    assert reasons(configure(method="quest"), page_size=64) == reasons(page_size=page_size) == []


def test_the_page_size_that_counts_is_the_runner_s():
    runner = SimpleNamespace(
        model_config=SimpleNamespace(**MODEL), server_args=SimpleNamespace(**SERVER), device="cpu", page_size=16
    )
    check_before_weights(configure(method="quest"), runner)


def test_quest_is_not_served_with_speculation():
    how = {"speculative_algorithm": "EAGLE", "speculative_draft_attention_backend": "triton", "page_size": 16}
    (reason,) = reasons(configure(method="quest"), device="cuda", **how)
    assert "--speculative-algorithm EAGLE" in reason and "leave one of them out" in reason


def test_a_speculative_draft_backend_of_its_own_is_served():
    how = {"speculative_algorithm": "EAGLE", "speculative_draft_attention_backend": "triton"}
    assert reasons(device="cuda", **how) == []


def test_budgets_and_caches_that_the_kernels_take_are_served_on_a_gpu():
    assert reasons(configure(budget=8192), device="cuda", kv_cache_dtype="fp8_e4m3") == []
    assert reasons(configure(budget=9000, aggregate="max"), device="cuda") == []
    assert reasons(configure(dense_backend="triton"), device="cuda", kv_cache_dtype="fp8_e5m2") == []
    assert reasons(configure(budget=9000)) == []
    assert reasons(configure(method="quest", budget=16384), device="cuda", page_size=64) == []


@pytest.mark.parametrize(("dense", "refused"), [("fa3", True), ("flashinfer", False)])
def test_fp8_e5m2_depends_on_the_default_dense_backend(monkeypatch, dense, refused):
    monkeypatch.setattr(refusals, "default_dense_backend", lambda device: dense)
    assert bool(reasons(device="cuda", kv_cache_dtype="fp8_e5m2")) == refused


def test_lora_is_served_by_what_a_device_has():
    assert reasons(enable_lora=True, lora_backend="torch_native") == []
    assert reasons(device="cuda", enable_lora=True, lora_backend="csgmv") == []


def test_recorded_metadata_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    (reason,) = reasons(device="cuda")
    assert "SGLANG_ENABLE_METADATA_GLUE_GRAPH" in reason and "unset it" in reason


def test_all_reasons_are_told_at_once():
    found = reasons(configure(budget=-1, selection_layers=(5, 3)), pp_size=2, enable_pdmux=True)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("prefill", "decode", "ours"),
    [
        ("lessismore", None, True),
        ("torch_native", "lessismore", True),
        ("lessismore", "triton", False),
        (None, None, False),
    ],
)
def test_either_form_of_the_flag_is_seen(prefill, decode, ours):
    args = SimpleNamespace(attention_backend=prefill, decode_attention_backend=decode)
    assert decodes_sparsely(args) is ours


@pytest.mark.parametrize(
    ("backend", "flags", "warned"),
    [(None, ["--lim-budget"], True), ("lessismore", ["--lim-budget"], False), ("fa3", [], False)],
)
def test_flags_without_the_backend_are_said_to_do_nothing(caplog, backend, flags, warned):
    warn_if_unused(flags, SimpleNamespace(**{**SERVER, "attention_backend": backend}))
    assert ("--lim-budget without --attention-backend lessismore" in caplog.text) == warned


@pytest.mark.parametrize(
    ("values", "warned"),
    [({"budget": 512}, True), ({"budget": 511}, False), ({"budget": 512, "method": "full"}, False)],
)
def test_a_budget_that_no_request_outgrows_is_said_to_be_one(caplog, values, warned):
    warn_if_always_dense(configure(**values), SimpleNamespace(context_len=512))
    assert ("--lim-budget 512 is no less than the context of 512" in caplog.text) == warned


def test_foreign_pools_and_layouts_are_refused():
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    with pytest.raises(RefusedConfig, match="KV pool object"):
        check_pool(object())
    pool = MHATokenToKVPool(16, 1, torch.float32, 2, 8, 1, "cpu", False)
    check_pool(pool)
    pool.kv_cache_layout = "hnd"
    with pytest.raises(RefusedConfig, match=r"'hnd'.*SGLANG_USE_HND_KVCACHE"):
        check_pool(pool)
