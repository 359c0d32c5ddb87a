"""The attention backend `lessismore`: a dense SGLang backend whose decode is sparse by the layer plan.

The dense backend is built by its own factory and its instance is given a subclass of its own class, so prefill,
mixed, verify and idle steps, metadata and whatever a release adds stay exactly the dense backend's. A decode step
copies its rows of `req_to_token` when SGLang prepares the step's metadata (`observe`, never captured) and reads nothing
of the scheduler's afterwards; no state crosses from one step to the next, except where `set_store` reuses sets and for
what `page_store` knows of the keys in the pool. What a captured graph runs is `begin` and the layers: sizes depend on
batch size, budget and the pool's width alone, and nothing waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_kernels.prefix_groups import PrefixGroups
from sgl_lim.methods import METHODS, Full, LessIsMore, Method, Role
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving import metrics
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.decode import DecodeStep, HeadShare, Scales, attend, begin_step
from sgl_lim.serving.page_store import PageStore
from sgl_lim.serving.recorder import Recorder
from sgl_lim.serving.set_store import SetStore
from sgl_lim.serving.snapshot import Snapshot
from sgl_lim.settings import refusals
from sgl_lim.settings.config import LimConfig, load
from sgl_lim.settings.parameters import build_method, ranking
from sgl_lim.settings.presets import resolve_layers

SCORE_BYTES = 1 << 30
"""Most memory that a selection layer's logits take; larger batches are scored some rows at a time."""
GRANULE = 128
"""Shared prefixes are found in multiples of so many tokens: less is not worth a program of its own."""


@dataclass
class SparseDecode:
    """What a backend instance holds for sparse decode."""

    method: Method
    roles: tuple[Role, ...]
    heads: HeadShare
    dense_backend: str
    dense_by_kernels: bool
    """Whether dense layers run on our operators in every step, rather than only where these read less."""
    layers_from: str
    pool: Any
    rows: Any
    snapshot: Snapshot
    counters: Counters
    granule: int | None
    """Shared prefixes are found in multiples of so many tokens; None where they are not looked for."""
    store: SetStore | None = None
    """Sets that outlive a step, with a selection interval above 1 or early sets."""
    pages: PageStore | None = None
    """Bounds of the pages' keys, where layers choose pages for themselves."""
    step: DecodeStep | None = None
    recorder: Recorder | None = None
    """While a model is calibrated: every layer is dense and records what sets would have covered."""

    def rows_at_once(self) -> int:
        """Rows that a selection layer of this step scores together."""
        assert self.step is not None
        return max(1, SCORE_BYTES // (4 * self.heads.own_heads * self.step.slots.shape[1]))

    def counted_groups(self) -> tuple[PrefixGroups | None, tuple[Role, ...]]:
        """Prefix groups of this step, and roles of the layers that read these once.

        Where dense and selection layers group different rows, what one of them saves is not counted.
        """
        assert self.step is not None
        groups, reuse = self.step.groups, self.step.reuse
        together: tuple[Role, ...] = (Role.SELECT,) if len(self.step.slots) <= self.rows_at_once() else ()
        if self.method.budget >= self.step.slots.shape[1]:
            # Layers that choose for themselves attend to everything, as dense layers do.
            together += (Role.OWN,)
        if reuse is None:
            return groups, (Role.DENSE, *together)
        if reuse.selecting is None:
            return groups, together
        return groups if reuse.early is None else reuse.early.groups, (Role.DENSE,)

    def learn(self, layer: Any, forward_batch: Any) -> None:
        """Take note of the keys that a layer has just stored for the tokens of a batch."""
        if self.pages is not None:
            self.pages.learn(layer.layer_id, forward_batch.out_cache_loc)

    def decodes_dense_layers(self) -> bool:
        """Whether this step's dense layers run on our operators."""
        assert self.step is not None
        if self.recorder is not None:
            return True
        early = self.step.reuse is not None and self.step.reuse.early is not None
        return self.dense_by_kernels or self.step.groups is not None or early


def make(runner: Any) -> Any:
    """Factory behind `--attention-backend lessismore`.

    Args:
        runner: SGLang's model runner, weights and pools ready.

    Returns:
        An instance of a subclass of the dense backend's class; for a draft worker the dense backend itself.

    Raises:
        RefusedConfig: with every reason why this configuration cannot work.
        RuntimeError: SGLang did not apply one of our hooks.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    import lim_patches

    lim_patches.verify()
    config = load()
    dense_name = config.dense_backend or refusals.default_dense_backend(runner.device)
    if runner.is_draft_worker:
        return ATTENTION_BACKENDS[dense_name](runner)
    refusals.check_before_weights(config, runner)
    refusals.check_pool(runner.token_to_kv_pool)
    refusals.warn_if_always_dense(config, runner.model_config)
    backend = ATTENTION_BACKENDS[dense_name](runner)
    backend.__class__ = sparse_subclass(type(backend))
    backend.lim = build_sparse_decode(config, runner, dense_name)
    metrics.announce(backend.lim, runner)
    return backend


def build_sparse_decode(config: LimConfig, runner: Any, dense_name: str) -> SparseDecode:
    """Resolve the configuration against the model: method, layer roles, head share, counters."""
    model = runner.model_config
    heads, recorder = head_share(model.num_attention_heads), None
    if config.record_budgets is None:
        layers, layers_from = resolve_layers(config, model)
        method = build_method(config, layers)
    else:
        layers_from = "none while recording"
        method = Full(budget=config.budget, selection_layers=(), **ranking(config))
        recorder = build_recorder(config, model.num_hidden_layers, heads, runner.req_to_token_pool.req_to_token.device)
    rows, pool = runner.req_to_token_pool, runner.token_to_kv_pool
    table = rows.req_to_token
    store = None
    # Where rows are no wider than the budget, no set is ever chosen, and a store would be as large as the budget.
    if config.remembers and config.budget < table.shape[1]:
        assert isinstance(method, LessIsMore)
        store = SetStore(
            method,
            config.selection_interval,
            num_rows=table.shape[0],
            num_slots=pool.size + pool.page_size,
            device=table.device,
            early=config.early_sets,
        )
    roles = method.layer_roles(model.num_hidden_layers)
    choosing = [layer for layer, role in enumerate(roles) if role is Role.OWN]
    return SparseDecode(
        method=method,
        roles=roles,
        heads=heads,
        dense_backend=dense_name,
        # torch_native decodes request by request; the operator takes the batch at once.
        dense_by_kernels=dense_name == "torch_native",
        layers_from=layers_from,
        pool=pool,
        rows=rows,
        snapshot=Snapshot(table, lead=0 if store is None else method.budget),
        counters=Counters(method, model.num_hidden_layers, table.shape[0], table.device),
        granule=GRANULE if config.prefix_groups and recorder is None else None,
        store=store,
        pages=PageStore(pool, choosing, model.dtype) if choosing else None,
        recorder=recorder,
    )


def build_recorder(config: LimConfig, num_layers: int, heads: HeadShare, device: torch.device) -> Recorder:
    """The recorder of the configured method at the budgets of `record_budgets`."""
    kind = METHODS[config.method]
    assert config.record_budgets is not None and issubclass(kind, Ranked)
    rules = [kind(budget=budget, selection_layers=(0,), **ranking(config)) for budget in config.record_budgets]
    return Recorder(rules, num_layers, heads, device)


def head_share(num_heads: int) -> HeadShare:
    """This rank's query heads in the attention-TP group. Ranks must choose one set, so their scores are combined."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    if group.world_size == 1:
        return HeadShare(first_head=0, own_heads=num_heads, num_heads=num_heads, reduce=None)

    def reduce(scores: Tensor, how: str) -> Tensor:
        gathered = group.all_gather(scores.contiguous(), dim=0).view(group.world_size, *scores.shape)
        return gathered.logsumexp(dim=0) if how == "logsumexp" else gathered.amax(dim=0)

    own = num_heads // group.world_size
    return HeadShare(first_head=group.rank_in_group * own, own_heads=own, num_heads=num_heads, reduce=reduce)


def sparse_subclass(dense: type) -> type:
    """A subclass of the dense backend's class with sparse decode. Instances need the attribute `lim`."""

    class LessIsMoreBackend(dense):
        """See the module docstring."""

        lim: SparseDecode

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.lim.step = None
            super().init_forward_metadata(forward_batch)
            # A dense backend that leaves this to SGLang's base class comes by the two methods below.
            if self.lim.step is None and observe(self.lim, forward_batch, captured=False):
                begin(self.lim, forward_batch)

        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            self.lim.snapshot.reserve(max_bs)

        def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
            observe(self.lim, forward_batch, captured=True)

        def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
            super().init_forward_metadata_in_graph(forward_batch)
            if decodes(forward_batch):
                begin(self.lim, forward_batch)

        def forward_extend(
            self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *more: Any, **options: Any
        ) -> Tensor:
            # Prefill and mixed steps are the dense backend's; keys are learnt once they are stored.
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
            lim = self.lim
            role = lim.roles[layer.layer_id]
            if lim.step is None or (role is Role.DENSE and not lim.decodes_dense_layers()):
                dense_out: Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
                lim.learn(layer, forward_batch)
                return dense_out
            refuse_options(layer, options)
            if save_kv_cache and k is not None:
                store_kv(lim.pool, layer, forward_batch, k, v)
            lim.learn(layer, forward_batch)
            operands = (
                q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
                lim.pool.get_key_buffer(layer.layer_id),
                lim.pool.get_value_buffer(layer.layer_id),
            )
            how: dict[str, Any] = {"scales": layer_scales(layer), "rows_at_once": lim.rows_at_once()}
            if lim.recorder is not None:
                out = lim.recorder.attend(layer.layer_id, lim.step, *operands, **how)
            else:
                if lim.pages is not None:
                    how["bounds"] = lim.pages.bounds(layer.layer_id)
                out = attend(lim.method, lim.step, role, *operands, heads=lim.heads, store=lim.store, **how)
                # Sets that have fewer tokens than the budget allows.
                if role is Role.OWN or (role is Role.SELECT and lim.method.top_p is not None):
                    assert lim.step.set_counts is not None
                    rows = forward_batch.req_pool_indices
                    lim.counters.record_sets(layer.layer_id, rows, lim.step.seq_lens, lim.step.set_counts)
            return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    LessIsMoreBackend.__name__ = f"LessIsMore{dense.__name__}"
    return LessIsMoreBackend


def decodes(forward_batch: Any) -> bool:
    """Whether this is a decode step with rows in it."""
    return forward_batch.forward_mode.is_decode() and forward_batch.batch_size > 0


def observe(lim: SparseDecode, forward_batch: Any, *, captured: bool) -> bool:
    """Copy what a decode step needs of the scheduler's; other steps are dense and only make their rows new.

    Args:
        captured: whether the step runs as a captured graph.

    Returns:
        Whether this is a decode step.
    """
    lim.step = None
    if decodes(forward_batch):
        lim.snapshot.take(forward_batch, captured=captured)
        lim.counters.learn_generations(lim.rows.req_generation)
        metrics.after_step(lim)
        return True
    mode = forward_batch.forward_mode
    if lim.store is not None and forward_batch.out_cache_loc is not None:
        lim.store.forget(forward_batch.out_cache_loc)
    if mode.is_mixed():
        # A row that extends by one token may be decoding, and then goes on.
        lim.counters.forget(forward_batch.req_pool_indices.long(), forward_batch.extend_seq_lens > 1)
    elif mode.is_extend() and not mode.is_target_verify():
        lim.counters.forget(forward_batch.req_pool_indices.long())
    return False


def begin(lim: SparseDecode, forward_batch: Any) -> None:
    """Start a decode step on the snapshot; in a captured graph this is recorded and replayed."""
    # A graph's lengths lie in SGLang's static buffers; an eager step's are copied before the scheduler may go on.
    seq_lens = forward_batch.seq_lens.to(torch.int32, copy=True)
    reads_all = lim.store is not None and lim.store.reads_all
    lim.step = begin_step(lim.method, lim.snapshot.slots, seq_lens, None if reads_all else lim.granule)
    acts = None
    if lim.store is not None:
        lim.step.reuse = lim.store.begin(
            forward_batch.req_pool_indices,
            lim.counters.generations,
            lim.snapshot.extended,
            seq_lens,
            lim.granule,
        )
        acts = lim.step.reuse.acts
    lim.counters.record(forward_batch.req_pool_indices, seq_lens, *lim.counted_groups(), acts, lim.step.shared)


def layer_scales(layer: Any) -> Scales:
    """Scale, logit cap and quantisation scales of a layer; a layer without the latter stores unscaled values."""
    k_scale = 1.0 if layer.k_scale is None else layer.k_scale_float
    v_scale = 1.0 if layer.v_scale is None else layer.v_scale_float
    return Scales(scale=layer.scaling, logit_cap=layer.logit_cap or 0.0, k_scale=k_scale, v_scale=v_scale)


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
