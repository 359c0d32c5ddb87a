"""The contract with captured graphs, on a dense backend of a few lines: what is captured reads buffers of ours alone.

A graph is imitated by keeping the step that was captured and running its attention again after each replay's metadata.
"""

from types import SimpleNamespace

import pytest
import torch

from sgl_lim.backend import SparseDecode, sparse_subclass
from sgl_lim.counters import Counters
from sgl_lim.decode import HeadShare, Scales, attend
from sgl_lim.methods import METHODS, Role
from sgl_lim.snapshot import Snapshot

ROWS, WIDTH, SLOTS, BUDGET = 6, 90, 400, 16
DECODE, EXTEND, MIXED, IDLE = "decode", "extend", "mixed", "idle"


class Dense:
    """What SGLang calls on an attention backend; eager metadata is its own, as in fa3, flashinfer and triton."""

    def __init__(self):
        self.calls = []

    def init_forward_metadata(self, forward_batch):
        self.calls.append("eager")

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.calls.append("state")

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.calls.append("out")

    def init_forward_metadata_in_graph(self, forward_batch):
        self.calls.append("in")


class Composed(Dense):
    """A dense backend whose eager metadata is composed of the other two, as in SGLang's base class."""

    def init_forward_metadata(self, forward_batch):
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)


class Mode(SimpleNamespace):
    def __getattr__(self, name):
        return lambda: name == f"is_{self.name}" or (name == "is_extend" and self.name == MIXED)


def batch_of(rows, lens, mode=DECODE, **more):
    return SimpleNamespace(
        forward_mode=Mode(name=mode),
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        **more,
    )


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(SLOTS - 1, generator=generator)[:WIDTH] + 1 for _ in range(ROWS)]
    return torch.stack(rows).int()


def build(table, dense=Dense, name="lessismore"):
    method = METHODS[name](BUDGET, 0.25, 2, "union", (1,))
    backend = dense()
    backend.__class__ = sparse_subclass(dense)
    backend.lim = SparseDecode(
        method=method,
        roles=method.layer_roles(3),
        heads=HeadShare(first_head=0, num_heads=4, reduce=None),
        dense_backend="dense",
        dense_by_kernels=False,
        layers_from="test",
        pool=None,
        rows=SimpleNamespace(req_to_token=table, req_generation=torch.zeros(ROWS, dtype=torch.int64), device="cpu"),
        snapshot=Snapshot(table),
        counters=Counters(method, 3, ROWS, table.device),
    )
    return backend


def attention(backend, step, batch):
    """Outputs of a selection and of a sparse layer of `step`."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(SLOTS, 2, 8, generator=generator) for _ in range(2))
    q = torch.randn(batch, 4, 8, generator=generator)
    roles = (Role.SELECT, Role.SPARSE) if backend.lim.method.name == "lessismore" else (Role.SPARSE,)
    scales = Scales(scale=0.3, logit_cap=0.0)
    return [attend(backend.lim.method, step, role, q, k, v, scales=scales, heads=backend.lim.heads) for role in roles]


def eagerly(table, rows, lens, name="lessismore"):
    backend = build(table.clone(), name=name)
    backend.init_forward_metadata(batch_of(rows, lens))
    return attention(backend, backend.lim.step, len(rows))


@pytest.mark.parametrize("name", ["lessismore", "window"])
def test_a_replay_equals_an_eager_step_whatever_the_scheduler_does_meanwhile(table, name):
    backend = build(table, name=name)
    backend.init_cuda_graph_state(4, 4)
    capture = batch_of([0, 0, 0], [1, 1, 1])
    backend.init_forward_metadata_out_graph(capture, in_capture=True)
    backend.init_forward_metadata_in_graph(capture)
    captured = backend.lim.step
    for rows, lens in (([3, 1, 0], [80, 9, 1]), ([2, 3, 5], [17, 81, 90]), ([4, 0, 0], [30, 1, 1])):
        before = table.clone()
        backend.init_forward_metadata_out_graph(batch_of(rows, lens))
        table.fill_(-1)  # rows are handed on and rewritten once the metadata is prepared
        # Replaying runs what was recorded after the copy: the step begins anew on the same buffers.
        backend.init_forward_metadata_in_graph(batch_of(rows, lens))
        assert backend.lim.step.slots.data_ptr() == captured.slots.data_ptr()
        assert backend.lim.step.seq_lens.tolist() == lens
        for ours, theirs in zip(
            attention(backend, backend.lim.step, len(rows)), eagerly(before, rows, lens, name), strict=True
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
        steps.append(backend.lim.step)
    assert len({step.slots.data_ptr() for step in steps}) == 1
    assert {step.slots.shape[1] for step in steps} == {-(-WIDTH // 16) * 16}


def test_an_eager_step_leaves_captured_buffers_alone(table):
    backend = build(table)
    backend.init_cuda_graph_state(2, 2)
    batch = batch_of([1, 2], [40, 50])
    backend.init_forward_metadata_out_graph(batch)
    backend.init_forward_metadata_in_graph(batch)
    captured = backend.lim.step
    slots = captured.slots.clone()
    backend.init_forward_metadata(batch_of([3, 4, 5], [20, 30, 90]))
    assert backend.lim.step.slots.shape == (3, 90)
    assert torch.equal(captured.slots, slots) and captured.seq_lens.tolist() == [40, 50]


@pytest.mark.parametrize("dense", [Dense, Composed])
def test_a_step_is_counted_once_and_the_dense_backend_prepares_its_own(table, dense):
    backend = build(table, dense)
    backend.init_cuda_graph_state(4, 4)
    backend.calls.clear()
    backend.init_forward_metadata(batch_of([1, 2], [40, 50]))
    assert backend.lim.counters.read()["decode_steps"] == 1
    assert backend.calls == (["eager"] if dense is Dense else ["out", "in"])
    assert backend.lim.step is not None


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
    assert backend.lim.step is None


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
