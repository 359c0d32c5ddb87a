"""The contract with captured graphs, on a dense backend of a few lines: what is captured reads buffers of ours alone.

A graph is imitated by keeping the step that was captured and running its attention again after each replay's metadata.
"""

import pytest
import torch

from sgl_lim.serving.snapshot import Snapshot
from support.fake_backend import DECODE, EXTEND, IDLE, MIXED, Composed, Dense, Mode, attention, batch_of, build

ROWS, WIDTH, SLOTS = 6, 90, 400


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(SLOTS - 1, generator=generator)[:WIDTH] + 1 for _ in range(ROWS)]
    return torch.stack(rows).int()


def eagerly(table, rows, lens, name="lessismore"):
    backend = build(table.clone(), method=name)
    backend.init_forward_metadata(batch_of(rows, lens))
    return attention(backend, backend.lim.plan, len(rows))


@pytest.mark.parametrize("name", ["lessismore", "window"])
def test_a_replay_equals_an_eager_step_whatever_the_scheduler_does_meanwhile(table, name):
    backend = build(table, method=name)
    backend.init_cuda_graph_state(4, 4)
    capture = batch_of([0, 0, 0], [1, 1, 1])
    backend.init_forward_metadata_out_graph(capture, in_capture=True)
    backend.init_forward_metadata_in_graph(capture)
    captured = backend.lim.plan
    for rows, lens in (([3, 1, 0], [80, 9, 1]), ([2, 3, 5], [17, 81, 90]), ([4, 0, 0], [30, 1, 1])):
        before = table.clone()
        backend.init_forward_metadata_out_graph(batch_of(rows, lens))
        table.fill_(-1)  # rows are handed on and rewritten once the metadata is prepared
        # Replaying runs what was recorded after the copy: the step begins anew on the same buffers.
        backend.init_forward_metadata_in_graph(batch_of(rows, lens))
        assert backend.lim.plan.context.slots.data_ptr() == captured.context.slots.data_ptr()
        assert backend.lim.plan.seq_lens.tolist() == lens
        for ours, theirs in zip(
            attention(backend, backend.lim.plan, len(rows)), eagerly(before, rows, lens, name), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        table.copy_(before)


def test_smaller_graphs_share_the_largest_one_s_buffers(table):
    backend = build(table)
    backend.init_cuda_graph_state(4, 4)
    steps = []
    for size in (4, 2, 1):
        batch = batch_of([0] * size, [1] * size)
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
        steps.append(backend.lim.plan)
    assert len({step.context.slots.data_ptr() for step in steps}) == 1
    assert {step.context.slots.shape[1] for step in steps} == {-(-WIDTH // 16) * 16}


def test_an_eager_step_leaves_captured_buffers_alone(table):
    backend = build(table)
    backend.init_cuda_graph_state(2, 2)
    batch = batch_of([1, 2], [40, 50])
    backend.init_forward_metadata_out_graph(batch)
    backend.init_forward_metadata_in_graph(batch)
    captured = backend.lim.plan
    slots = captured.context.slots.clone()
    backend.init_forward_metadata(batch_of([3, 4, 5], [20, 30, 90]))
    assert backend.lim.plan.context.slots.shape == (3, 90)
    assert torch.equal(captured.context.slots, slots) and captured.seq_lens.tolist() == [40, 50]


@pytest.mark.parametrize("dense", [Dense, Composed])
def test_a_step_is_counted_once_and_the_dense_backend_prepares_its_own(table, dense):
    backend = build(table, dense)
    backend.init_cuda_graph_state(4, 4)
    backend.calls.clear()
    backend.init_forward_metadata(batch_of([1, 2], [40, 50]))
    assert backend.lim.counters.read()["decode_steps"] == 1
    assert backend.calls == (["eager"] if dense is Dense else ["out", "in"])
    assert backend.lim.plan is not None


def test_padded_rows_of_a_replay_are_not_counted(table):
    backend = build(table)
    backend.init_cuda_graph_state(4, 4)
    capture = batch_of([0, 0, 0, 0], [1, 1, 1, 1])
    backend.init_forward_metadata_out_graph(capture, in_capture=True)
    backend.init_forward_metadata_in_graph(capture)
    assert backend.lim.counters.read()["decode_steps"] == 0
    replay = batch_of([3, 0, 0, 0], [40, 1, 1, 1])
    backend.init_forward_metadata_out_graph(replay)
    backend.init_forward_metadata_in_graph(replay)
    totals = backend.lim.counters.read()
    assert (totals["decode_steps"], totals["requests"], totals["tokens_dense"]) == (1, 1, 3 * 40)


@pytest.mark.parametrize("mode", [EXTEND, IDLE])
def test_other_steps_have_no_sparse_metadata(table, mode):
    backend = build(table)
    backend.init_forward_metadata(batch_of([1], [40]))
    backend.init_forward_metadata(batch_of([1], [40], mode=mode))
    assert backend.lim.plan is None


def test_a_prefill_makes_its_row_a_new_request(table):
    backend = build(table)
    for mode in (DECODE, EXTEND, DECODE):
        backend.init_forward_metadata(batch_of([1], [40], mode=mode))
    assert backend.lim.counters.read()["requests"] == 2


def test_a_decoding_row_of_a_mixed_step_goes_on(table):
    backend = build(table)
    backend.init_forward_metadata(batch_of([1], [40]))
    backend.init_forward_metadata(batch_of([1, 2], [41, 30], mode=MIXED, extend_seq_lens=torch.tensor([1, 30])))
    backend.init_forward_metadata(batch_of([1, 2], [42, 31]))
    assert backend.lim.counters.read()["requests"] == 2


def test_a_decode_batch_that_runs_as_a_prefill_goes_on(table):
    """DP attention does so while another group prefills: a token a row, padded rows behind them."""
    backend = build(table)
    backend.init_forward_metadata(batch_of([1, 2], [40, 50]))
    as_prefill = batch_of([1, 2, 0], [41, 51, 1], mode=EXTEND, extend_seq_lens=torch.tensor([1, 1, 1]))
    as_prefill._original_forward_mode = Mode(name=DECODE)
    backend.init_forward_metadata(as_prefill)
    assert backend.lim.plan is None
    backend.init_forward_metadata(batch_of([1, 2], [42, 52]))
    assert backend.lim.counters.read()["requests"] == 2


@pytest.mark.parametrize("values", [{}, {"selection_interval": 4, "early_sets": True}], ids=["plain", "kept-sets"])
def test_a_group_without_requests_decodes_along(table, values):
    """DP attention: eagerly its padded rows are idle; in a captured graph they decode the padding row."""
    backend = build(table, **values)
    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata(batch_of([0, 0], [1, 1], mode=IDLE))
    assert backend.lim.plan is None
    replay = batch_of([0, 0, 0, 0], [1, 1, 1, 1])
    backend.init_forward_metadata_out_graph(replay)
    backend.init_forward_metadata_in_graph(replay)
    out = attention(backend, backend.lim.plan, 4)
    assert all(layer.isfinite().all() for layer in out)
    backend.init_forward_metadata(batch_of([3], [40]))
    totals = backend.lim.counters.read()
    assert (totals["decode_steps"], totals["requests"], totals["tokens_dense"]) == (1, 1, 3 * 40)


def test_eager_rows_are_as_wide_as_the_longest_and_captured_ones_as_the_pool(table):
    snapshot = Snapshot(table, room=8)
    snapshot.reserve(2)
    for rows, lens in (([1, 2, 3], [5, 3, 20]), ([4], [60]), ([1, 2, 3, 4, 5], [2, 2, 2, 2, 33])):
        snapshot.take(batch_of(rows, lens), captured=False)
        assert snapshot.extended.shape == (len(rows), 8 + max(lens))
        for row, (one, length) in enumerate(zip(rows, lens, strict=True)):
            assert torch.equal(snapshot.slots[row, :length], table[one, :length])
    # Five rows of 41 columns are the most, rounded up to 48.
    assert snapshot._eager.numel() == 5 * 48
    snapshot.take(batch_of([1, 2], [9, 4]), captured=True)
    assert snapshot.extended.shape == (2, 8 + 96)
