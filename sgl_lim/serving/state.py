"""What a backend instance holds for sparse decode, and how it is built for a model."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sgl_lim.methods import HeadsOfRank, Method, Role
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving import memory
from sgl_lim.serving.arrivals import Arrivals
from sgl_lim.serving.counters import Counters
from sgl_lim.serving.draft_sets import Drafts
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.layer import LayerDecode
from sgl_lim.serving.own_pages import Pages, build_pages
from sgl_lim.serving.ranks import RankExchange
from sgl_lim.serving.reads import Plan
from sgl_lim.serving.snapshot import Snapshot
from sgl_lim.serving.verification import VerifyPlan
from sgl_lim.settings.arriving_kv import brings_kv
from sgl_lim.settings.config import LimConfig
from sgl_lim.settings.layers import Layers, resolve_layers

GRANULE = 128
"""Shared prefixes are found in multiples of so many tokens: less is not worth a program of its own."""


@dataclass
class LimState:
    """Sparse decode of one model runner."""

    decode: LayerDecode
    roles: tuple[Role, ...]
    dense_backend: str
    dense_by_kernels: bool
    """Whether dense layers run on our operators in every step, rather than only where these read less."""
    layers: Layers
    """Where the selection layers come from, and what was measured of them."""
    pool: Any
    rows: Any
    snapshot: Snapshot
    counters: Counters
    granule: int | None
    """Shared prefixes are found in multiples of so many tokens; None where they are not looked for."""
    pages: Pages | None = None
    """What is known of the pool's pages, where layers choose pages for themselves."""
    arrivals: Arrivals | None = None
    """Where KV may come without a prefill, and something is kept of KV slots."""
    plan: Plan | None = None
    """Of the decode step that runs; None in all other steps."""
    drafts: Drafts | None = None
    """Where decode is lossless: what the drafts of this model share with their verification."""
    drafting: bool = False
    """Whether this backend's decode steps are drafts; where decode is lossless, those of the other one are dense."""
    branches_once: bool = False
    """Whether verification reads a prefix once that branches share, also where the dense backend can verify."""
    verify: VerifyPlan | None = None
    """Of the verification that runs; None in all other steps."""

    @property
    def method(self) -> Method:
        """The method served."""
        return self.decode.method

    @property
    def kept_sets(self) -> KeptSets | None:
        """Sets that outlive a step, with a selection interval above 1 or early sets."""
        return self.decode.kept_sets

    def learn(self, layer: Any, forward_batch: Any) -> None:
        """Take note of the keys that a layer has just stored for the tokens of a batch."""
        if self.pages is not None:
            slots = forward_batch.out_cache_loc
            # A prefill that runs as pieces of a graph pads its positions, and gives attention the slots of real tokens.
            self.pages.learn(layer.layer_id, slots, forward_batch.positions[: len(slots)])

    def learn_arrivals(self, forward_batch: Any) -> None:
        """Take note of the KV of requests that decode for the first time, in the step of the snapshot."""
        arrived = None if self.arrivals is None else self.arrivals.take(self.snapshot.slots, forward_batch)
        if arrived is None:
            return
        if self.pages is not None:
            self.pages.learn_rows(*arrived)
        if self.kept_sets is not None:
            self.kept_sets.forget_rows(*arrived)

    @property
    def verifies(self) -> bool:
        """Whether verification runs on our operators, rather than on the dense backend's."""
        return self.dense_by_kernels or (self.branches_once and self.granule is not None)

    @property
    def dense_decode(self) -> bool:
        """Whether decode steps attend to everything, because what they say is the answer."""
        return self.drafts is not None and not self.drafting

    def role(self, layer: int) -> Role:
        """What a layer does in a decode step."""
        return Role.DENSE if self.dense_decode else self.roles[layer]

    def decodes(self, role: Role) -> bool:
        """Whether layers of a role run on our operators in this step; if not, they are the dense backend's."""
        if self.plan is None:
            return False
        if role is not Role.DENSE or self.dense_by_kernels:
            return True
        # Dense layers read less by ours where prefixes are shared, and with early sets.
        return self.plan.dense is not self.plan.context or self.plan.dense.groups is not None


def build_state(config: LimConfig, runner: Any, dense_backend: str, heads: HeadsOfRank) -> LimState:
    """Resolve the configuration against a model runner of SGLang, whose weights and pools are ready.

    Args:
        heads: as `share_of_heads` gives them.
    """
    num_layers, rows, pool = runner.model_config.num_hidden_layers, runner.req_to_token_pool, runner.token_to_kv_pool
    # No row has more tokens than the pool.
    table = rows.req_to_token[:, : pool.size]
    layers = agreed(resolve_layers(config, runner.model_config, runner.server_args.load_format), heads)
    method = config.build(**layers.parameters)
    score_bytes = memory.count(runner, method, heads) if table.is_cuda else None
    kept_sets = build_kept_sets(method, table, pool.size + pool.page_size)
    roles = method.layer_roles(num_layers)
    pages = build_pages(method, roles, runner, heads)
    remembers = pages is not None or kept_sets is not None
    return LimState(
        decode=LayerDecode(method, heads, combiner(heads, per_kv_head=method.per_kv_head), kept_sets, score_bytes),
        roles=roles,
        dense_backend=dense_backend,
        # torch_native decodes request by request; the operator takes the batch at once.
        dense_by_kernels=dense_backend == "torch_native",
        layers=layers,
        pool=pool,
        rows=rows,
        snapshot=Snapshot(table, room=0 if kept_sets is None else method.budget),
        counters=Counters(
            method.budget,
            roles,
            table.shape[0],
            table.device,
            keys_alone=method.selection_attends == "set",
            overlap=not runner.server_args.disable_overlap_schedule,
        ),
        granule=GRANULE if config.prefix_groups else None,
        pages=pages,
        arrivals=Arrivals(rows) if remembers and brings_kv(runner.server_args) else None,
    )


def build_kept_sets(method: Method, table: Tensor, num_slots: int) -> KeptSets | None:
    """Room for the sets of the rows of a request pool, if they outlive a step.

    Where rows are no wider than the budget, no set is ever chosen, and the room would be as large as the budget.
    """
    if method.keeping is None or method.budget >= table.shape[1]:
        return None
    assert isinstance(method, Ranked)
    return KeptSets(
        method.keeping,
        method.sizes,
        len(method.selection_layers),
        num_rows=table.shape[0],
        num_slots=num_slots,
        device=table.device,
    )


def agreed(layers: Layers, heads: HeadsOfRank) -> Layers:
    """The first rank's layers: a rank on another host has a cache of its own, and calibrations kept in it."""
    if heads.own == heads.all:
        return layers
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    decided: Layers = get_attn_tp_group().broadcast_object(layers, src=0)
    return decided


def share_of_heads(num_heads: int, num_kv_heads: int) -> HeadsOfRank:
    """This rank's query heads in the attention-TP group, of the model's numbers of heads."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    own = num_heads // group.world_size
    # More ranks than KV heads: as many ranks in a row hold the same one.
    sharing = max(1, group.world_size // num_kv_heads)
    return HeadsOfRank(first=group.rank_in_group * own, own=own, all=num_heads, sharing=sharing)


def combiner(heads: HeadsOfRank, *, per_kv_head: bool) -> RankExchange | None:
    """What combines the scores of the ranks that must choose one set; None if this rank has all heads of each set."""
    together = heads.sharing if per_kv_head else heads.all // heads.own
    if together == 1:
        return None
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    return RankExchange(group, group.rank_in_group // together * together, together)
