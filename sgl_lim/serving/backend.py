"""The attention backend `lessismore`: a dense SGLang backend whose decode is sparse by a plan of reads.

The dense backend is built by its own factory, and its instance then gets a class that puts `SparseDecodeMixin` before
its own class. So prefill, mixed, verify and idle steps, metadata and whatever a release adds stay exactly the dense
backend's. A decode step copies its rows of `req_to_token` when SGLang prepares the step's metadata (`observe`, never
captured) and reads nothing of the scheduler's afterwards. No state crosses from one step to the next, except where
`kept_sets` reuses sets and for what `page_store` knows of the keys in the pool. What a captured graph runs is `begin`
and the layers: sizes depend on batch size, budget and the pool's width alone, and nothing waits for the device.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

import lim_patches
from lim_kernels import Scaling
from sgl_lim.methods import Role
from sgl_lim.serving import metrics
from sgl_lim.serving.layer import LayerInput
from sgl_lim.serving.reads import plan_reads
from sgl_lim.serving.state import LimState, build_state, share_of_heads
from sgl_lim.settings import refusals
from sgl_lim.settings.flags import load


def make(runner: Any) -> Any:
    """Factory behind `--attention-backend lessismore`.

    Args:
        runner: SGLang's model runner, weights and pools ready.

    Returns:
        An instance of the dense backend with sparse decode; for a draft worker the dense backend itself.

    Raises:
        RefusedConfig: with every reason why this configuration cannot work.
        RuntimeError: SGLang did not apply one of our hooks.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    lim_patches.verify()
    config = load()
    dense_backend = config.dense_backend or refusals.default_dense_backend(runner.device)
    if runner.is_draft_worker:
        return ATTENTION_BACKENDS[dense_backend](runner)
    refusals.check_before_weights(config, runner)
    refusals.check_pool(runner.token_to_kv_pool)
    refusals.warn_if_always_dense(config, runner.model_config)
    backend = ATTENTION_BACKENDS[dense_backend](runner)
    heads, combine_ranks = share_of_heads(runner.model_config.num_attention_heads)
    add_sparse_decode(backend, build_state(config, runner, dense_backend, heads, combine_ranks))
    metrics.announce(backend.lim, runner)
    return backend


def add_sparse_decode(backend: Any, lim: LimState) -> None:
    """Give an instance of a dense backend sparse decode."""
    dense = type(backend)
    backend.__class__ = type(f"LessIsMore{dense.__name__}", (SparseDecodeMixin, dense), {})
    backend.lim = lim


class SparseDecodeMixin(AttentionBackend):
    """Sparse decode over the dense backend that follows in the class's bases.

    It derives from SGLang's base class, because Python gives an instance only a class of the same layout.
    """

    lim: LimState

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step that runs eagerly."""
        self.lim.plan = None
        super().init_forward_metadata(forward_batch)
        # A dense backend that leaves this to SGLang's base class comes by the two methods below.
        if self.lim.plan is None and observe(self.lim, forward_batch, captured=False):
            begin(self.lim, forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs read."""
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.lim.snapshot.reserve(max_bs)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a captured step; this itself is never captured."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        observe(self.lim, forward_batch, captured=True)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The beginning of a captured step."""
        super().init_forward_metadata_in_graph(forward_batch)
        if is_decode_step(forward_batch):
            begin(self.lim, forward_batch)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *more: Any, **options: Any
    ) -> Tensor:
        """Prefill and mixed steps are the dense backend's; keys are learnt once they are stored."""
        out: Tensor = super().forward_extend(q, k, v, layer, forward_batch, *more, **options)
        self.lim.learn(layer, forward_batch)
        return out

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> Tensor:
        """A layer of a decode step, by our operators or by the dense backend."""
        lim = self.lim
        if not lim.decodes(lim.roles[layer.layer_id]):
            dense_out: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
            lim.learn(layer, forward_batch)
            return dense_out
        refuse_options(layer, options)
        if save_kv_cache and k is not None:
            store_kv(lim.pool, layer, forward_batch, k, v)
        lim.learn(layer, forward_batch)
        return run_layer(lim, q, layer, forward_batch)


def is_decode_step(forward_batch: Any) -> bool:
    """Whether this is a decode step with rows in it."""
    return forward_batch.forward_mode.is_decode() and forward_batch.batch_size > 0


def observe(lim: LimState, forward_batch: Any, *, captured: bool) -> bool:
    """Copy what a decode step needs of the scheduler's; other steps are dense and only make their rows new.

    Args:
        captured: whether the step runs as a captured graph.

    Returns:
        Whether this is a decode step.
    """
    lim.plan = None
    if is_decode_step(forward_batch):
        lim.snapshot.take(forward_batch, captured=captured)
        lim.counters.learn_generations(lim.rows.req_generation)
        metrics.after_step(lim)
        return True
    mode = forward_batch.forward_mode
    if lim.kept_sets is not None and forward_batch.out_cache_loc is not None:
        lim.kept_sets.forget(forward_batch.out_cache_loc)
    if mode.is_mixed():
        # A row that extends by one token may be decoding, and then goes on.
        lim.counters.forget(forward_batch.req_pool_indices.long(), forward_batch.extend_seq_lens > 1)
    elif mode.is_extend() and not mode.is_target_verify():
        lim.counters.forget(forward_batch.req_pool_indices.long())
    return False


def begin(lim: LimState, forward_batch: Any) -> None:
    """Plan a decode step on the snapshot; in a captured graph this is recorded and replayed."""
    # A graph's lengths lie in SGLang's static buffers; an eager step's are copied before the scheduler may go on.
    seq_lens, rows, kept = forward_batch.seq_lens.to(torch.int32, copy=True), forward_batch.req_pool_indices, None
    if lim.kept_sets is not None:
        kept = lim.kept_sets.begin(rows, lim.counters.generations, lim.snapshot.extended, seq_lens, lim.granule)
    lim.plan = plan_reads(
        lim.method,
        lim.snapshot.slots,
        seq_lens,
        own_heads=lim.decode.heads.own,
        granule=lim.granule,
        kept=kept,
    )
    lim.counters.record(rows, lim.plan)


def run_layer(lim: LimState, q: Tensor, layer: Any, forward_batch: Any) -> Tensor:
    """Attention of one layer of SGLang's in the step of `lim.plan`, [B, H * D_v]; the current token is stored."""
    assert lim.plan is not None
    index = layer.layer_id
    operands = LayerInput(
        q=q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k_cache=lim.pool.get_key_buffer(index),
        v_cache=lim.pool.get_value_buffer(index),
        scaling=scaling_of(layer),
        bounds=None if lim.pages is None else lim.pages.bounds(index),
    )
    role = lim.roles[index]
    out = lim.decode.run(lim.plan, role, operands)
    if lim.method.sizes_vary and role in (Role.OWN, Role.SELECT):
        lim.counters.record_sets(index, forward_batch.req_pool_indices, lim.plan)
    return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)


def scaling_of(layer: Any) -> Scaling:
    """Scale, logit cap and quantisation scales of a layer; a layer without the latter stores unscaled values."""
    k_scale = 1.0 if layer.k_scale is None else layer.k_scale_float
    v_scale = 1.0 if layer.v_scale is None else layer.v_scale_float
    return Scaling(scale=layer.scaling, logit_cap=layer.logit_cap or 0.0, k_scale=k_scale, v_scale=v_scale)


def store_kv(pool: Any, layer: Any, forward_batch: Any, k: Tensor, v: Tensor) -> None:
    """Write the step's keys and values to their slots, as the dense backends do."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    for_batch = getattr(KVWriteLoc, "for_batch", None)
    where = for_batch(forward_batch) if for_batch else KVWriteLoc(forward_batch.out_cache_loc)
    pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)


def refuse_options(layer: Any, options: dict[str, Any]) -> None:
    """Raise NotImplementedError for what a layer asks of attention that sparse decode does not do."""
    asked = [name for name, value in options.items() if value is not None]
    if layer.is_cross_attention:
        asked.append("cross attention")
    if layer.sliding_window_size > -1:
        asked.append("a sliding window")
    if asked:
        raise NotImplementedError(
            f"layer {layer.layer_id} asks for {', '.join(asked)}, which lessismore does not decode; "
            "serve this model with a dense --attention-backend"
        )
