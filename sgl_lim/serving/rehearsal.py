"""Launches what decode steps of given batch sizes launch, on tensors without memory, so that kernels compile ahead.

A server captures a graph for each of dozens of batch sizes, largest first. Without a rehearsal its launches would wait
for one compilation after the other. What is rehearsed is the code that decodes: a plan, and a layer of each role.
Layers that choose pages for themselves, and the lossless mode's drafts and verification, compile as they come.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_kernels import Scaling
from sgl_lim.methods import HeadsOfRank, Role
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.memory import captured_batches
from sgl_lim.serving.ranks import RankExchange
from sgl_lim.serving.reads import plan_reads
from sgl_lim.serving.state import LimState

logger = logging.getLogger(__name__)

META = torch.device("meta")


@dataclass(frozen=True)
class Stage:
    """What the shapes of a step follow from, beside its batch size."""

    decode: LayerDecode
    roles: tuple[Role, ...]
    dense_by_kernels: bool
    granule: int | None
    width: int
    request_rows: int
    slots: int
    q_dtype: torch.dtype
    keys: Tensor
    """One layer's of the pool; values alike."""
    values: Tensor
    logit_cap: float = 0.0


def compile_ahead(lim: LimState, runner: Any) -> None:
    """Compile what the graphs of a GPU server launch, before SGLang captures them; says how long it took.

    A kernel that this leaves out compiles when it is launched first, and one that Triton has kept on disk is read.

    Args:
        runner: SGLang's model runner, whose weights and pools are ready.
    """
    batches = captured_batches(runner)
    if not (lim.rows.req_to_token.is_cuda and batches and isinstance(lim.method, Ranked)):
        return
    with rehearsed_for(f"{len(batches)} batch sizes"):
        rehearse(stage_of(lim, runner), batches)


@contextmanager
def rehearsed_for(purpose: str) -> Iterator[None]:
    """`lim_kernels.rehearsal.rehearsed`, which then says for what its kernels are and how long they took."""
    from lim_kernels.rehearsal import rehearsed

    began = time.perf_counter()
    with rehearsed() as compiled:
        yield
    taken = time.perf_counter() - began
    logger.info("sgl-lim: %d kernels ready for %s after %.1f s", len(compiled.raw_futures), purpose, taken)


def stage_of(lim: LimState, runner: Any) -> Stage:
    """The shapes of a state, and of the model runner that it was built for."""
    table, pool = lim.rows.req_to_token, lim.pool
    return Stage(
        decode=lim.decode,
        roles=lim.roles,
        dense_by_kernels=lim.dense_by_kernels,
        granule=lim.granule,
        width=min(table.shape[1], pool.size),
        request_rows=table.shape[0],
        slots=pool.size + pool.page_size,
        q_dtype=runner.model_config.dtype,
        keys=pool.get_key_buffer(0),
        values=pool.get_value_buffer(0),
    )


class NobodyElse:
    """A group whose ranks tell nothing."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Room for what all would tell."""
        return tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])


def rehearse(stage: Stage, batches: Sequence[int]) -> None:
    """Run one layer of each role of a step of each batch size; within `lim_kernels.rehearsal.rehearsed`."""
    decode = _on_meta(stage)
    counters = Counters(decode.method.budget, stage.roles, stage.request_rows, META)
    for batch in batches:
        _rehearse_step(stage, decode, counters, batch)


def _on_meta(stage: Stage) -> LayerDecode:
    """The stage's `decode` without memory, and without other ranks."""
    found, kept = stage.decode, None
    exchange = found.combine_ranks
    if isinstance(exchange, RankExchange):
        exchange = RankExchange(NobodyElse(exchange.group.world_size), exchange.first, exchange.together)
    if found.kept_sets is not None:
        method = found.method
        assert isinstance(method, Ranked)
        kept = KeptSets(
            found.kept_sets.keeping,
            method.sizes,
            len(method.selection_layers),
            num_rows=stage.request_rows,
            num_slots=stage.slots,
            device=META,
        )
    return LayerDecode(found.method, found.heads, exchange, kept, found.score_bytes)


def _rehearse_step(stage: Stage, decode: LayerDecode, counters: Counters, batch: int) -> None:
    method, room = decode.method, 0 if decode.kept_sets is None else decode.method.budget
    width = room + -(-stage.width // 16) * 16
    extended = torch.empty(batch, width, dtype=torch.int32, device=META)
    lens, rows = (torch.empty(batch, dtype=kind, device=META) for kind in (torch.int32, torch.int64))
    kept = None
    if decode.kept_sets is not None:
        tenants = torch.empty(stage.request_rows, dtype=torch.int64, device=META)
        kept = decode.kept_sets.begin(rows, tenants, extended, lens, stage.granule)
    plan = plan_reads(method, extended[:, room:], lens, together=decode.together, granule=stage.granule, kept=kept)
    counters.record(rows, plan)
    layer = _layer(stage, decode.heads, batch)
    reads_less = plan.dense.groups is not None or (kept is not None and kept.early is not None)
    for role in (Role.DENSE, Role.SELECT, Role.SPARSE):
        if role in stage.roles and (role is not Role.DENSE or stage.dense_by_kernels or reads_less):
            decode.run(plan, role, layer)
        if role is Role.SELECT and method.sizes_vary:
            counters.record_sets(stage.roles.index(role), rows, plan)
    if kept is not None and Role.SELECT in stage.roles:
        # The last selection layer places no sets for the next.
        for _ in range(stage.roles.count(Role.SELECT) - 1):
            decode.run(plan, Role.SELECT, layer)


def _layer(stage: Stage, heads: HeadsOfRank, batch: int) -> LayerInput:
    """Query, keys and values as a model's layer brings them: the query is a part of a projection of all three."""
    dim, kv_heads = stage.keys.shape[2], stage.keys.shape[1]
    projected = torch.empty(batch, (heads.own + 2 * kv_heads) * dim, dtype=stage.q_dtype, device=META)
    k, v = (
        torch.empty_strided(pool.shape, pool.stride(), dtype=pool.dtype, device=META)
        for pool in (stage.keys, stage.values)
    )
    q = projected[:, : heads.own * dim].view(batch, heads.own, dim)
    return LayerInput(q, k, v, Scaling(0.1, logit_cap=stage.logit_cap))
