"""The attention backend `lessismore`: a dense SGLang backend whose decode is sparse by the layer plan.

The dense backend is built by its own factory and its instance is given a subclass of its own class, so prefill,
mixed, verify and idle steps, metadata and whatever a release adds stay exactly the dense backend's. A decode step
copies its rows of `req_to_token` when SGLang prepares the step's metadata and reads nothing of the scheduler's
afterwards; no state crosses from one step to the next.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_lim import checks, metrics
from sgl_lim.config import LimConfig, load
from sgl_lim.counters import Counters
from sgl_lim.decode import DecodeStep, HeadShare, attend, begin_step
from sgl_lim.methods import METHODS, Method, Role
from sgl_lim.presets import selection_layers_for


@dataclass
class SparseDecode:
    """What a backend instance holds for sparse decode."""

    method: Method
    roles: tuple[Role, ...]
    heads: HeadShare
    dense_backend: str
    dense_by_kernels: bool
    """Whether dense layers run on our decode operator rather than on the dense backend's decode."""
    layers_from: str
    pool: Any
    rows: Any
    counters: Counters
    step: DecodeStep | None = None


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
    dense_name = config.dense_backend or default_dense_backend(runner.device)
    if runner.is_draft_worker:
        return ATTENTION_BACKENDS[dense_name](runner)
    checks.check_before_weights(config, runner)
    checks.check_pool(runner.token_to_kv_pool)
    backend = ATTENTION_BACKENDS[dense_name](runner)
    backend.__class__ = sparse_subclass(type(backend))
    backend.lim = build_sparse_decode(config, runner, dense_name)
    metrics.announce(backend.lim, runner)
    return backend


def default_dense_backend(device: str) -> str:
    """Dense backend where `--lim-dense-backend` names none: fa3 on sm_90, flashinfer on other CUDA, else torch."""
    if device != "cuda":
        return "torch_native"
    if torch.version.hip is not None:
        return "triton"
    return "fa3" if torch.cuda.get_device_capability()[0] == 9 else "flashinfer"


def build_sparse_decode(config: LimConfig, runner: Any, dense_name: str) -> SparseDecode:
    """Resolve the configuration against the model: method, layer roles, head share, counters."""
    model = runner.model_config
    layers, layers_from = config.selection_layers, "--lim-selection-layers"
    if layers is None:
        layers, layers_from = selection_layers_for(model.model_path, model.num_hidden_layers)
    method = METHODS[config.method](
        budget=config.budget,
        recency=config.recency,
        sinks=config.sinks,
        aggregate=config.aggregate,
        selection_layers=layers,
    )
    rows = runner.req_to_token_pool
    table = rows.req_to_token
    return SparseDecode(
        method=method,
        roles=method.layer_roles(model.num_hidden_layers),
        heads=head_share(model.num_attention_heads),
        dense_backend=dense_name,
        # torch_native decodes request by request; the operator takes the batch at once.
        dense_by_kernels=dense_name == "torch_native",
        layers_from=layers_from,
        pool=runner.token_to_kv_pool,
        rows=rows,
        counters=Counters(method, model.num_hidden_layers, table.shape[0], table.device),
    )


def head_share(num_heads: int) -> HeadShare:
    """This rank's query heads in the attention-TP group. Ranks must choose one set, so their scores are combined."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    if group.world_size == 1:
        return HeadShare(first_head=0, num_heads=num_heads, reduce=None)

    def reduce(scores: Tensor, how: str) -> Tensor:
        if how == "sum":
            return group.all_reduce(scores)
        gathered = group.all_gather(scores.contiguous(), dim=0)
        return gathered.view(group.world_size, *scores.shape).amax(dim=0)

    return HeadShare(
        first_head=group.rank_in_group * (num_heads // group.world_size), num_heads=num_heads, reduce=reduce
    )


def sparse_subclass(dense: type) -> type:
    """A subclass of the dense backend's class with sparse decode. Instances need the attribute `lim`."""

    class LessIsMoreBackend(dense):
        """See the module docstring."""

        lim: SparseDecode

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            prepare(self.lim, forward_batch)

        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            raise checks.RefusedConfig(["CUDA graphs need the Triton kernels; pass --disable-cuda-graph"])

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
            if lim.step is None or (role is Role.DENSE and not lim.dense_by_kernels):
                return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
            refuse_options(layer, options)
            if save_kv_cache and k is not None:
                store_kv(lim.pool, layer, forward_batch, k, v)
            out = attend(
                lim.method,
                lim.step,
                role,
                q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
                lim.pool.get_key_buffer(layer.layer_id),
                lim.pool.get_value_buffer(layer.layer_id),
                scale=layer.scaling,
                logit_cap=layer.logit_cap,
                heads=lim.heads,
            )
            return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    LessIsMoreBackend.__name__ = f"LessIsMore{dense.__name__}"
    return LessIsMoreBackend


def prepare(lim: SparseDecode, forward_batch: Any) -> None:
    """Copy what a decode step needs of the request pool; other steps are dense and only forget their rows."""
    lim.step = None
    rows = forward_batch.req_pool_indices
    if not forward_batch.forward_mode.is_decode():
        if forward_batch.forward_mode.is_mixed():
            # A row that extends by one token may be decoding, and then goes on.
            lim.counters.forget(rows.long(), forward_batch.extend_seq_lens > 1)
        elif forward_batch.forward_mode.is_extend():
            lim.counters.forget(rows.long())
        return
    if forward_batch.batch_size == 0:
        return
    rows = rows.long()
    on_host = forward_batch.seq_lens_cpu
    longest = int((forward_batch.seq_lens if on_host is None else on_host).max())
    seq_lens = forward_batch.seq_lens.long()
    lim.step = begin_step(lim.method, lim.rows.req_to_token[:, :longest].index_select(0, rows), seq_lens)
    generations = lim.rows.req_generation.to(rows.device, non_blocking=True)[rows]
    lim.counters.record(rows, generations, seq_lens, real=rows != 0)
    metrics.after_step(lim)


def store_kv(pool: Any, layer: Any, forward_batch: Any, k: Tensor, v: Tensor) -> None:
    """Write the step's keys and values to their slots, as the dense backends do."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    for_batch = getattr(KVWriteLoc, "for_batch", None)
    where = for_batch(forward_batch) if for_batch else KVWriteLoc(forward_batch.out_cache_loc)
    pool.set_kv_buffer(layer, where, k, v)


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
