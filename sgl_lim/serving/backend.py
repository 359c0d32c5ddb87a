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
from sgl_lim.methods import Full, Role
from sgl_lim.serving import metrics
from sgl_lim.serving.draft_sets import plan_drafts, read_unguided
from sgl_lim.serving.key_scales import key_scale
from sgl_lim.serving.layer import LayerInput
from sgl_lim.serving.reads import Plan, Read, plan_reads
from sgl_lim.serving.rehearsal import compile_ahead
from sgl_lim.serving.state import LimState, build_state, share_of_heads
from sgl_lim.serving.verification import (
    VerifyPlan,
    attend_run,
    guide_drafts,
    guides,
    is_verification,
    plan_guide,
    read_of_run,
    tokens_verified,
)
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
    model = runner.model_config
    heads = share_of_heads(model.num_attention_heads, model.get_total_num_kv_heads())
    add_sparse_decode(backend, build_state(config, runner, dense_backend, heads))
    metrics.announce(backend.lim, runner)
    compile_ahead(backend.lim, runner)
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
    reserved: tuple[int, int] = (0, 0)
    """Rows and tokens for which captured graphs have their memory."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step that runs eagerly."""
        lim = self.lim
        lim.plan = lim.verify = None
        super().init_forward_metadata(forward_batch)
        # A dense backend that leaves this to SGLang's base class comes by the two methods below.
        if lim.plan is None and lim.verify is None and observe(lim, forward_batch, captured=False):
            begin(lim, forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs read.

        A backend whose graphs verify and decode is asked twice. What the first graphs read must not move.
        """
        rows, tokens = self.reserved
        if max_bs <= rows and max_num_tokens <= tokens:
            return
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.lim.snapshot.reserve(max_bs)
        self.reserved = max_bs, max_num_tokens

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a captured step; this itself is never captured."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        observe(self.lim, forward_batch, captured=True)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The beginning of a captured step."""
        super().init_forward_metadata_in_graph(forward_batch)
        if is_ours(self.lim, forward_batch):
            begin(self.lim, forward_batch)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        """Prefill and mixed steps are the dense backend's, and verification where it has one.

        What needs the step's keys comes behind it: they are stored then.
        """
        lim = self.lim
        if lim.verify is None or lim.verify.attend is None:
            out: Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, *more, **options)
        else:
            refuse_options(layer, options)
            if save_kv_cache and k is not None:
                store_kv(lim.pool, layer, forward_batch, k, v)
            out = attend_run(lim.verify.attend, layer_input(lim, q, layer)).reshape(len(q), -1)
        lim.learn(layer, forward_batch)
        if guides(lim.verify, lim.roles[layer.layer_id]):
            on_verify_layer(lim, q, layer, forward_batch)
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
        if not lim.decodes(lim.role(layer.layer_id)):
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


def is_ours(lim: LimState, forward_batch: Any) -> bool:
    """Whether this is a step that `begin` plans: a decode step, or a verification where decode is lossless."""
    return is_decode_step(forward_batch) or (lim.drafts is not None and is_verification(forward_batch))


def observe(lim: LimState, forward_batch: Any, *, captured: bool) -> bool:
    """Copy what a step of ours needs of the scheduler's; other steps are dense and only make their rows new.

    Args:
        captured: whether the step runs as a captured graph.

    Returns:
        Whether this is a step of ours, as `is_ours`.
    """
    lim.plan = lim.verify = None
    if is_ours(lim, forward_batch):
        # A row's length leaves out what is verified behind it.
        beyond = 0 if is_decode_step(forward_batch) else tokens_verified(forward_batch)
        lim.snapshot.take(forward_batch, captured=captured, beyond=beyond)
        lim.counters.learn_generations(lim.rows.req_generation)
        lim.learn_arrivals(forward_batch)
        metrics.after_step(lim)
        return True
    mode = forward_batch.forward_mode
    forget_sets(lim, forward_batch)
    if lim.kept_sets is not None and forward_batch.out_cache_loc is not None:
        lim.kept_sets.forget(forward_batch.out_cache_loc)
    if mode.is_mixed() or was_decoding(forward_batch):
        # A row that extends by one token may be decoding, and then goes on.
        lim.counters.forget(forward_batch.req_pool_indices.long(), forward_batch.extend_seq_lens > 1)
    elif mode.is_extend() and not mode.is_target_verify():
        lim.counters.forget(forward_batch.req_pool_indices.long())
    return False


def was_decoding(forward_batch: Any) -> bool:
    """Whether SGLang runs a decode batch as a prefill of one token a row, as another group of DP attention prefills."""
    original = getattr(forward_batch, "_original_forward_mode", None)
    return original is not None and bool(original.is_decode())


def forget_sets(lim: LimState, forward_batch: Any) -> None:
    """A step that is not ours runs on these rows: whoever drafts there next may be another."""
    if lim.drafts is not None and lim.drafts.sets is not None and not forward_batch.forward_mode.is_idle():
        lim.drafts.sets.forget(forward_batch.req_pool_indices.long())


def begin(lim: LimState, forward_batch: Any) -> None:
    """Plan a step on the snapshot; in a captured graph this is recorded and replayed."""
    # A graph's lengths lie in SGLang's static buffers; an eager step's are copied before the scheduler may go on.
    seq_lens, rows = forward_batch.seq_lens.to(torch.int32, copy=True), forward_batch.req_pool_indices
    if not is_decode_step(forward_batch):
        begin_verification(lim, rows, seq_lens, tokens_verified(forward_batch))
    elif lim.drafting:
        lim.plan = begin_draft(lim, rows, seq_lens)
    else:
        lim.plan = begin_decode(lim, rows, seq_lens)
        lim.counters.record(rows, lim.plan)


def begin_verification(lim: LimState, rows: Tensor, lens: Tensor, tokens: int) -> None:
    """Plan a verification of so many tokens behind `lens` int32 [B] tokens of each row."""
    assert lim.drafts is not None
    guided, slots = lim.drafts.sets is not None, lim.snapshot.slots
    lim.verify = VerifyPlan(
        tokens,
        attend=read_of_run(slots, lens, tokens, lim.granule) if lim.verifies else None,
        guide=plan_guide(lim.decode, slots, lens + 1, lim.granule) if guided else None,
    )
    if lim.verify.guide is not None and lim.drafts.sets is not None:
        lim.drafts.sets.begin(rows, lim.counters.generations, lim.verify.guide.seq_lens)


def begin_draft(lim: LimState, rows: Tensor, seq_lens: Tensor) -> Plan:
    """Plan a draft step: on sets that are there, or as the method decodes. Lengths include the token drafted from."""
    assert lim.drafts is not None
    sets = lim.drafts.sets
    slots = lim.snapshot.slots
    if sets is None:
        plan = plan_reads(lim.method, slots, seq_lens, together=lim.decode.together, granule=lim.granule)
        read = read_unguided(lim.method, lim.roles, seq_lens)
    else:
        placed, read = sets.place(rows, lim.counters.generations, slots, seq_lens)
        plan = plan_drafts(Read(slots, seq_lens), placed)
    lim.drafts.read.index_add_(0, rows.long(), read)
    return plan


def begin_decode(lim: LimState, rows: Tensor, seq_lens: Tensor) -> Plan:
    """Plan a step whose tokens are the answer."""
    kept = None
    if lim.kept_sets is not None:
        kept = lim.kept_sets.begin(rows, lim.counters.generations, lim.snapshot.extended, seq_lens, lim.granule)
    # Dense decode of a GPU is the dense backend's own, for no round may be slower than that.
    own = not lim.dense_decode or lim.dense_by_kernels
    return plan_reads(
        Full() if lim.dense_decode else lim.method,
        lim.snapshot.slots,
        seq_lens,
        together=lim.decode.together,
        granule=lim.granule if own else None,
        kept=kept,
    )


def on_verify_layer(lim: LimState, q: Tensor, layer: Any, forward_batch: Any) -> None:
    """Choose the sets of a selection layer for the drafts to come, from the queries [B * tokens, H * D] verified."""
    assert lim.drafts is not None and lim.verify is not None
    operands = layer_input(lim, q, layer)
    guide_drafts(lim.decode, lim.drafts, lim.verify, forward_batch.req_pool_indices, layer.layer_id, operands)


def run_layer(lim: LimState, q: Tensor, layer: Any, forward_batch: Any) -> Tensor:
    """Attention of one layer of SGLang's in the step of `lim.plan`, [B, H * D_v]; the current token is stored."""
    assert lim.plan is not None
    index = layer.layer_id
    role = lim.role(index)
    out = lim.decode.run(lim.plan, role, layer_input(lim, q, layer))
    if lim.method.sizes_vary and role in (Role.OWN, Role.SELECT) and not lim.drafting:
        differ = role is Role.OWN and lim.method.sets_differ
        lim.counters.record_sets(index, forward_batch.req_pool_indices, lim.plan, differ=differ)
    return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)


def layer_input(lim: LimState, q: Tensor, layer: Any) -> LayerInput:
    """What a layer of SGLang's brings to attention."""
    index = layer.layer_id
    return LayerInput(
        q=q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k_cache=lim.pool.get_key_buffer(index),
        v_cache=lim.pool.get_value_buffer(index),
        scaling=scaling_of(layer),
        pages=None if lim.pages is None else lim.pages.of_layer(index),
    )


def scaling_of(layer: Any) -> Scaling:
    """Scale, logit cap and quantisation scales of a layer; a layer without the latter stores unscaled values."""
    v_scale = 1.0 if layer.v_scale is None else layer.v_scale_float
    return Scaling(scale=layer.scaling, logit_cap=layer.logit_cap or 0.0, k_scale=key_scale(layer), v_scale=v_scale)


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
