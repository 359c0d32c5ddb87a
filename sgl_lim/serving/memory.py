"""What sparse decode takes of a GPU's memory beside SGLang, counted before it serves: from the method and shapes alone.

SGLang sizes its KV pool so that `1 - --mem-fraction-static` of the memory is left for everything else. Ours comes out
of that, and most of it is a selection layer's logits. If they do not fit, batches are scored in smaller parts.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from lim_kernels import scratch
from lim_kernels.page_bounds import PAGE
from sgl_lim.methods import HeadsOfRank, Method, Role, SeerAttention
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.reads import SCORE_BYTES, places_together, score_together
from sgl_lim.settings.arriving_kv import brings_kv
from sgl_lim.settings.config import RefusedConfig

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of the memory that is free, ours if scoring in parts keeps to it; the rest is for SGLang's activations and graphs."""
MOST = 0.8
"""Of it, ours at most."""


@dataclass(frozen=True)
class Shapes:
    """What decides how much memory is needed, beside the method."""

    batch: int
    """Rows of the largest step that is captured, or that may run."""
    width: int
    """Tokens that a row may have."""
    heads: HeadsOfRank
    kv_heads: int
    head_dim: int
    roles: tuple[Role, ...]
    request_rows: int
    slots: int
    """Of the KV pool."""
    element_bytes: int = 2
    """Of a query's element."""
    multiprocessors: int = 132
    arrives: bool = False
    """Whether KV of rows may arrive that nobody here wrote; their slots are copied when they first decode."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for; those of a step are given back after each layer."""

    static: dict[str, int]
    step: dict[str, int]
    parts: int
    """In how many parts the largest batch is scored."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.static.values()) + sum(self.step.values())

    def __str__(self) -> str:
        shown = {**self.static, **self.step}
        named = ", ".join(f"{name} {_megabytes(count)}" for name, count in shown.items() if count)
        scored = f"; the largest batch is scored in {self.parts} parts" if self.parts > 1 else ""
        kept, brief = (sum(kind.values()) for kind in (self.static, self.step))
        return f"{_megabytes(kept)} kept, {_megabytes(brief)} while a layer selects ({named}){scored}"


def memory_needed(method: Method, shapes: Shapes, score_bytes: int = SCORE_BYTES) -> Memory:
    """Memory beside SGLang's, if logits take `score_bytes` at most or as much as one row needs."""
    static = {"slots of the batch": 4 * shapes.batch * _columns(method, shapes), **_kept(method, shapes)}
    selecting = method.budget < shapes.width and {Role.SELECT, Role.OWN} & set(shapes.roles)
    if not selecting:
        return Memory(static, {}, 1)
    if not isinstance(method, Ranked):
        return Memory(static, _own_step(method, shapes), 1)
    own, places = shapes.heads.own, scratch.row_places(shapes.width)
    parts = score_together(shapes.batch, places, places_together(own, score_bytes))
    rows = parts[0].stop - parts[0].start
    sets = shapes.kv_heads if method.per_kv_head else 1
    scores = scratch.scores_bytes(rows * sets, own // sets, shapes.width, method.sizes, method.aggregate)
    if len(parts) > 1:
        # Those of all parts, and then all together.
        scores += 2 * 4 * shapes.batch * sets * places
    grouped = method.keeping is None and method.needs_prefix_groups is not None
    step = {
        "logits": scratch.logits_bytes(rows, own, shapes.width),
        "scores": scores,
        "sets": scratch.choice_bytes(shapes.batch * sets, shapes.width, method.budget, grouped=grouped),
        "attention": _attention(shapes),
        "exchange between ranks": _exchange(method, shapes, sets),
        **_arriving(method, shapes),
    }
    return Memory(static, step, len(parts))


def fit(method: Method, shapes: Shapes, free: int) -> tuple[int, Memory]:
    """Most bytes that logits may take, so that all of ours fits into our share of `free` bytes, and what is needed.

    Raises:
        RefusedConfig: it does not fit even if each row is scored by itself.
    """
    room = int(SHARE * free)
    for part in range(1, shapes.batch + 1):
        rows = -(-shapes.batch // part)
        limit = min(SCORE_BYTES, scratch.logits_bytes(rows, shapes.heads.own, shapes.width))
        needed = memory_needed(method, shapes, limit)
        if needed.total <= room:
            return limit, needed
    if needed.total <= MOST * free:
        return limit, needed
    ours = _megabytes(int(MOST * free))
    raise RefusedConfig(
        [
            f"--mem-fraction-static leaves {_megabytes(free)}, of which sparse decode may take {ours}, and needs "
            f"{needed}; lower --mem-fraction-static, --context-length ({shapes.width} tokens a row) or "
            f"--cuda-graph-max-bs-decode ({shapes.batch} rows)"
        ]
    )


def count(runner: Any, method: Method, heads: HeadsOfRank) -> int:
    """Most bytes that logits may take on this GPU, the same on all ranks; logs the one line that says what was counted.

    Args:
        runner: SGLang's model runner, whose weights and pools are ready, and whose graphs are not captured yet.

    Raises:
        RefusedConfig: as `fit`.
    """
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free, group = torch.cuda.mem_get_info()[0] + reserved, get_attn_tp_group()
    if group.world_size > 1:
        # Ranks that scored other parts than one another would exchange scores of other rows.
        free = min(group.all_gather_object(free))
    batches = captured_batches(runner)
    shapes = shapes_of(runner, method, heads, max(batches, default=runner.req_to_token_pool.size))
    limit, needed = fit(method, shapes, free)
    if group.rank_in_group == 0:
        logger.info("sgl-lim memory: %s, of %s that SGLang left free", needed, _megabytes(free))
    return limit


def captured_batches(runner: Any) -> list[int]:
    """Batch sizes of the decode graphs that SGLang captures; none where steps run eagerly."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture

    if check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return []
    return list(get_batch_sizes_to_capture(runner)[0])


def shapes_of(runner: Any, method: Method, heads: HeadsOfRank, batch: int) -> Shapes:
    """The shapes of a model runner of SGLang, whose pools are ready."""
    model, pool, table = runner.model_config, runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
    return Shapes(
        batch=batch,
        width=min(table.shape[1], pool.size),
        heads=heads,
        kv_heads=max(1, model.get_total_num_kv_heads() * heads.own // heads.all),
        head_dim=model.head_dim,
        roles=method.layer_roles(model.num_hidden_layers),
        request_rows=table.shape[0],
        slots=pool.size + pool.page_size,
        element_bytes=model.dtype.itemsize,
        arrives=brings_kv(runner.server_args),
    )


def _columns(method: Method, shapes: Shapes) -> int:
    """Places that a row of the snapshot has."""
    return scratch.row_places(shapes.width) + (method.budget if _keeps(method, shapes) else 0)


def _keeps(method: Method, shapes: Shapes) -> bool:
    return method.keeping is not None and method.budget < shapes.width


def _kept(method: Method, shapes: Shapes) -> dict[str, int]:
    """What outlives a step: sets and when slots were selected, and bounds or gate keys of pages."""
    found, choosing = {}, shapes.roles.count(Role.OWN)
    if _keeps(method, shapes):
        assert isinstance(method, Ranked) and method.keeping is not None
        layers = len(method.selection_layers) if method.keeping.interval > 1 else 1
        row = 4 * layers * method.sizes.middle + 16
        found["kept sets"] = shapes.request_rows * row + 4 * layers * shapes.slots + 4
    if choosing and isinstance(method, SeerAttention):
        width = 0 if method.gate_config is None else method.gate_config.width
        blocks = -(-shapes.slots // method.page)
        found["gate keys"] = choosing * blocks * shapes.kv_heads * width * shapes.element_bytes
    elif choosing:
        pages = -(-shapes.slots // PAGE)
        found["bounds of pages"] = 2 * choosing * pages * shapes.kv_heads * shapes.head_dim * shapes.element_bytes
    return found


def _own_step(method: Method, shapes: Shapes) -> dict[str, int]:
    """What a layer takes that chooses pages for itself."""
    lines, pages = shapes.batch * shapes.kv_heads, -(-shapes.width // method.page)
    chosen = method.budget // method.page
    return {
        "scores": 4 * lines * scratch.row_places(pages),
        "sets": scratch.choice_bytes(lines, pages, chosen) + 4 * lines * (method.budget + 1),
        "attention": _attention(shapes),
        **_arriving(method, shapes),
    }


def _arriving(method: Method, shapes: Shapes) -> dict[str, int]:
    """Slots of rows whose KV nobody here wrote, for methods that keep something of what is written."""
    remembers = _keeps(method, shapes) or not isinstance(method, Ranked)
    return {"rows that arrive": 4 * shapes.batch * shapes.width} if shapes.arrives and remembers else {}


def _exchange(method: Method, shapes: Shapes, sets: int) -> int:
    """What ranks tell one another of their scores."""
    ranks, lines = shapes.heads.all // shapes.heads.own, shapes.batch * sets
    if ranks == 1 or (method.per_kv_head and shapes.heads.sharing == 1):
        return 0
    if method.best_suffice:
        # Positions and scores of this rank, of all, and positions in 64 bits to write them by.
        return lines * method.budget * (16 + 8 * ranks + 16 * ranks)
    return 4 * 4 * lines * scratch.row_places(shapes.width)


def _attention(shapes: Shapes) -> int:
    return scratch.attention_bytes(
        shapes.batch, shapes.heads.own, shapes.kv_heads, shapes.head_dim, shapes.multiprocessors
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
