"""By which backend and graphs each pass runs, and what those graphs say that they capture."""

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from sgl_lim.serving.lossless.graphs import DecodeGraph, VerifyGraph
from sgl_lim.serving.lossless.passes import Pass, Passes, most_rows


def test_a_pass_leaves_the_runner_as_it_was() -> None:
    runner = SimpleNamespace(attn_backend="own", decode_cuda_graph_runner="own graphs")
    one = Pass("draft", "draft graphs")
    with one.on(runner):
        assert (runner.attn_backend, runner.decode_cuda_graph_runner) == ("draft", "draft graphs")
    with pytest.raises(ValueError), one.on(runner):
        raise ValueError
    assert (runner.attn_backend, runner.decode_cuda_graph_runner) == ("own", "own graphs")


def test_graphs_of_decode_steps_are_of_decode_steps_whatever_sglang_sets() -> None:
    graph = object.__new__(DecodeGraph)
    graph.capture_forward_mode = ForwardMode.TARGET_VERIFY
    assert graph.capture_forward_mode is ForwardMode.DECODE
    assert graph.get_spec_info(8) is None


def test_graphs_of_verification_are_of_a_chain_without_a_mask() -> None:
    graph = object.__new__(VerifyGraph)
    graph.captured_req_width = 5
    spec_info = graph.get_spec_info(20)
    assert spec_info.draft_token_num == spec_info.num_tokens_per_req == 5
    assert spec_info.custom_mask is None and spec_info.topk == 1
    assert spec_info.capture_hidden_mode is CaptureHiddenMode.NULL


def test_batches_that_draft_have_graphs_or_logits_that_fit() -> None:
    runner = SimpleNamespace(model_config=SimpleNamespace(vocab_size=1 << 16))
    plain = Pass("target")
    assert most_rows(runner, Passes(plain, plain, {3: plain})) == (1 << 30) // (4 * (1 << 16) * 4)
    captured = Pass("target", SimpleNamespace(max_bs=160))
    assert most_rows(runner, Passes(plain, plain, {3: captured})) == 160
