"""Our backend over a dense backend of a few lines, and batches to drive it with."""

from types import SimpleNamespace

import torch

from sgl_lim.methods import METHODS, Role
from sgl_lim.serving.backend import SparseDecode, sparse_subclass
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.decode import HeadShare, Scales, attend
from sgl_lim.serving.set_store import SetStore
from sgl_lim.serving.snapshot import Snapshot

BUDGET = 16
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


def batch_of(rows, lens, mode=DECODE, written=None, **more):
    return SimpleNamespace(
        forward_mode=Mode(name=mode),
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        out_cache_loc=torch.tensor(written if written is not None else [0] * len(rows)),
        **more,
    )


def build(
    table, dense=Dense, name="lessismore", granule=4, interval=1, num_slots=400, selection="request", early=False
):
    """Our backend over the rows of `table`; three layers, the second selects."""
    method = METHODS[name](BUDGET, 0.25, 2, "union", (1,), selection)
    remembers = interval > 1 or early
    store = SetStore(method, interval, len(table), num_slots, "cpu", early=early) if remembers else None
    backend = dense()
    backend.__class__ = sparse_subclass(dense)
    backend.lim = SparseDecode(
        method=method,
        roles=method.layer_roles(3),
        heads=HeadShare(first_head=0, own_heads=4, num_heads=4, reduce=None),
        dense_backend="dense",
        dense_by_kernels=False,
        layers_from="test",
        pool=None,
        rows=SimpleNamespace(
            req_to_token=table, req_generation=torch.zeros(len(table), dtype=torch.int64), device="cpu"
        ),
        snapshot=Snapshot(table, lead=BUDGET if store else 0),
        counters=Counters(method, 3, len(table), table.device),
        granule=granule,
        store=store,
    )
    return backend


def operands(batch, num_slots=400):
    """Queries of a step and the pool's keys and values, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(num_slots, 2, 8, generator=generator) for _ in range(2))
    return torch.randn(batch, 4, 8, generator=generator), k, v


def attention(backend, step, batch, num_slots=400, **options):
    """Outputs of a selection and of a sparse layer of `step`, on `operands`."""
    q, k, v = operands(batch, num_slots)
    roles = (Role.SELECT, Role.SPARSE) if backend.lim.method.name == "lessismore" else (Role.SPARSE,)
    scales = Scales(scale=0.3, logit_cap=0.0)
    lim = backend.lim
    return [
        attend(lim.method, step, role, q, k, v, scales=scales, heads=lim.heads, store=lim.store, **options)
        for role in roles
    ]
