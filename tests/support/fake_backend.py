"""Our backend over a dense backend of a few lines, built by the real builder, and batches to drive it with."""

from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from lim_kernels import Scaling
from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.serving.backend import add_sparse_decode
from sgl_lim.serving.layer import LayerInput
from sgl_lim.serving.lossless.draft_backend import draft_state, share_drafts
from sgl_lim.serving.state import build_state
from sgl_lim.settings.config import configure
from support.gate_oracle import THETA, angles

BUDGET = 16
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 3
DECODE, EXTEND, MIXED, IDLE, VERIFY = "decode", "extend", "mixed", "idle", "target_verify"


class Dense(AttentionBackend):
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

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        self.calls.append("extend")
        return q

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        self.calls.append("decode")
        return q


class Composed(Dense):
    """A dense backend whose eager metadata is composed of the other two, as in SGLang's base class."""

    def init_forward_metadata(self, forward_batch):
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)


class Mode(SimpleNamespace):
    def __getattr__(self, name):
        return lambda: name == f"is_{self.name}" or (name == "is_extend" and self.name in (MIXED, VERIFY))


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


class Pool:
    """A KV pool of one layer's random keys and values, the same in every layer and for every pool of a size."""

    page_size = 1

    def __init__(self, num_slots):
        self.size = num_slots - 1
        generator = torch.Generator().manual_seed(1)
        self.k, self.v = (torch.randn(num_slots, KV_HEADS, DIM, generator=generator) for _ in range(2))

    def get_key_buffer(self, layer):
        return self.k

    def get_value_buffer(self, layer):
        return self.v


class RotaryEmbedding(torch.nn.Module):
    """SGLang's plain rotation, by what is read of it."""

    is_neox_style, base = True, THETA

    def __init__(self):
        super().__init__()
        self.cos_sin_cache = angles(DIM, 256, 1.0)


class Attention(torch.nn.Module):
    """A decoder layer's attention of SGLang's, with its rotation."""

    def __init__(self, layer, rotary):
        super().__init__()
        self.rotary_emb, self.attn = rotary, torch.nn.Identity()
        self.attn.layer_id, self.attn.k_scale, self.attn.k_scale_float = layer, None, None


def runner_of(table, num_slots=400, **server):
    """What the builder asks of SGLang's model runner, for three layers over the rows of `table`.

    `server` are its server arguments beyond those that are always there.
    """
    model = SimpleNamespace(
        num_attention_heads=HEADS, num_hidden_layers=LAYERS, model_path="nameless", dtype=torch.float32, context_len=256
    )
    generations = torch.zeros(len(table), dtype=torch.int64)
    rotary = RotaryEmbedding()
    rows = SimpleNamespace(req_to_token=table, req_generation=generations, device="cpu")
    return SimpleNamespace(
        model_config=model,
        req_to_token_pool=rows,
        token_to_kv_pool=Pool(num_slots),
        model=torch.nn.ModuleList(Attention(layer, rotary) for layer in range(LAYERS)),
        server_args=SimpleNamespace(load_format="auto", disable_overlap_schedule=True, **server),
    )


def build(table, dense=Dense, granule=4, num_slots=400, server=None, **values):
    """Our backend over the rows of `table`; three layers, the second selects.

    `values` are the configuration's; a granule of None switches prefix groups off; `server` as `runner_of` has it.
    """
    plain = {"budget": BUDGET, "recency": 0.25, "sinks": 2, "selection_layers": (1,)}
    config = configure(**{**plain, "prefix_groups": granule is not None, **values})
    assert config.problems() == []
    all_heads = HeadsOfRank(first=0, own=HEADS, all=HEADS)
    lim = build_state(config, runner_of(table, num_slots, **(server or {})), "fa3", all_heads)
    lim.granule = granule
    backend = dense()
    add_sparse_decode(backend, lim)
    return backend


def lossless(table, tokens, dense=Dense, guided=True, **values):
    """A target's backend that verifies so many tokens of a row, and one that drafts, over the rows of `table`."""
    target = build(table, dense, **values)
    share_drafts(target.lim, tokens=tokens, guided=guided, overlap=False)
    draft = dense()
    add_sparse_decode(draft, draft_state(target.lim))
    return target, draft


def verification(rows, lens, tokens, **more):
    """A batch that verifies so many tokens behind each row's length."""
    return batch_of(rows, lens, mode=VERIFY, spec_info=SimpleNamespace(draft_token_num=tokens), **more)


def layer_named(index):
    """What our backend asks of a layer of SGLang's."""
    return SimpleNamespace(
        layer_id=index,
        tp_q_head_num=HEADS,
        qk_head_dim=DIM,
        v_head_dim=DIM,
        scaling=0.3,
        logit_cap=0.0,
        k_scale=None,
        v_scale=None,
        is_cross_attention=False,
        sliding_window_size=-1,
    )


def verify(target, batch, q):
    """The outputs of all layers of a verification, each [B * tokens, H, D], of queries [B * tokens, H, D]."""
    target.init_forward_metadata(batch)
    layers = [layer_named(index) for index in range(LAYERS)]
    outs = [target.forward_extend(q.flatten(1), None, None, layer, batch, False) for layer in layers]
    return [out.view_as(q) for out in outs]


def queries(batch):
    """Queries of a step, the same in every call."""
    return torch.randn(batch, HEADS, DIM, generator=torch.Generator().manual_seed(2))


def run_role(backend, plan, role, batch):
    """The output of a layer of this role in the step of `plan`, on `queries` and the pool."""
    lim = backend.lim
    layer = LayerInput(queries(batch), lim.pool.k, lim.pool.v, Scaling(scale=0.3))
    return lim.decode.run(plan, role, layer)


def attention(backend, plan, batch):
    """Outputs of a selection layer, if the method has any, and of a sparse layer."""
    roles = [role for role in (Role.SELECT, Role.SPARSE) if role in backend.lim.roles]
    return [run_role(backend, plan, role, batch) for role in roles]
