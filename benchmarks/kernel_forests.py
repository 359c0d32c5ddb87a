"""Forests of prefixes for `kernel_sections.py`: their operands, our grouped decode, and FlashInfer's cascade."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.forest import Forest
from benchmarks.kernel_operands import Operands, Pool, Shape, full_lens
from lim_kernels import grouped_decode
from lim_kernels.prefix_groups import PrefixGroups

Cascade = Callable[[Operands, Forest], list[Callable[[], tuple[Tensor]]]]
"""A baseline of attention that is told the levels: its calls, one a place of the operands; each returns (out,)."""

CASCADES = ("fa2", "auto")
_WORKSPACE_BYTES = 256 << 20


def stored_tokens(forest: Forest) -> int:
    """Tokens in the pool: those of a node once."""
    return forest.batch * forest.own + sum(tokens for tokens, _, _ in forest.shared())


def draw_forest(pool: Pool, forest: Forest) -> Operands:
    """Queries and scattered slots of a forest's rows: rows below a node have its slots in common."""
    stored = stored_tokens(forest)
    sets = pool.shape.slot_sets(stored)
    order = torch.randperm(pool.num_slots, device=pool.device)[: sets * stored] + 1
    slots = [_rows_of(part, forest) for part in order.to(torch.int32).view(sets, stored)]
    q = torch.randn(forest.batch, pool.shape.heads, pool.shape.dim, dtype=pool.shape.dtype, device=pool.device)
    return Operands(q, pool.caches, slots, full_lens(forest.batch, forest.context, pool.device))


def _rows_of(stored: Tensor, forest: Forest) -> Tensor:
    """int32 [batch, context] from the slots of all nodes, level by level."""
    parts, nodes, begin = [], 1, 0
    for count, tokens in forest.levels:
        nodes *= count
        level = stored[begin : begin + nodes * tokens].view(nodes, tokens)
        parts.append(level.repeat_interleave(forest.batch // nodes, dim=0))
        begin += nodes * tokens
    return torch.cat(parts, dim=1)


def attend_in_groups(*operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`grouped_decode` as a dense layer calls it: out and lse."""
    out, lse, _ = grouped_decode(*operands, **options)
    return out, lse


def groups_deviation(found: PrefixGroups, wanted: PrefixGroups) -> float:
    """Share of the entries of two groupings of the same rows that differ, where they are defined."""
    named = torch.arange(len(wanted.counts), device=wanted.counts.device) < wanted.counts.unsqueeze(1)
    wrong = total = 0
    for field in fields(PrefixGroups):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "members":
            ours, theirs = ours[named], theirs[named]
        wrong, total = wrong + int((ours != theirs).sum()), total + theirs.numel()
    return wrong / total


def flashinfer_cascades(shape: Shape, kernels: Sequence[str] = CASCADES) -> dict[str, Cascade]:
    """FlashInfer's cascade by implementation: of its FA2 kernels at every level, and as it comes (`auto`).

    On Hopper its own choice are kernels of large query tiles that do not split the KV, which decode may not like; its
    wrapper leaves no other, so the one of FA2 is made of the same parts by hand. Each compiles at its first plan, which
    is never timed; an import or a compiler that fails becomes the error of its rows.
    """
    return {f"flashinfer {name}": partial(_prepare, shape, name) for name in kernels}


def _prepare(shape: Shape, backend: str, operands: Operands, forest: Forest) -> list[Callable[[], tuple[Tensor]]]:
    """Plan every place's levels. The plans are for these very lengths, which suits it better than a served graph's."""
    from flashinfer.cascade import MultiLevelCascadeAttentionWrapper

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=operands.q.device)
    sizes = {
        "num_qo_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.dim,
        "page_size": 1,
        "sm_scale": operands.scale,
        "q_data_type": shape.dtype,
        "kv_data_type": shape.dtype,
    }
    calls: list[Callable[[], tuple[Tensor]]] = []
    for slots in operands.slots:
        wrapper: Any
        if backend == "auto":
            wrapper = MultiLevelCascadeAttentionWrapper(len(forest.levels), workspace, "NHD")
        else:
            wrapper = ChosenCascade(len(forest.levels), workspace, backend)
        wrapper.plan(*level_tables(slots, forest), **sizes)
        calls += [partial(_run, wrapper, operands.q, keys, values) for keys, values in operands.caches]
    return calls


def _run(wrapper: Any, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor]:
    return (wrapper.run(q, (keys.unsqueeze(1), values.unsqueeze(1))),)


class ChosenCascade:
    """`MultiLevelCascadeAttentionWrapper` of kernels that are chosen by name."""

    def __init__(self, levels: int, workspace: Tensor, backend: str) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper, merge_state_in_place

        self._levels = [BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend) for _ in range(levels)]
        self._merge = merge_state_in_place

    def plan(self, *tables: list[Tensor], head_dim: int, **sizes: Any) -> None:
        """As the wrapper's."""
        for level, of_level in zip(self._levels, zip(*tables, strict=True), strict=True):
            level.plan(*of_level, head_dim_qk=head_dim, **sizes)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        """As the wrapper's: the rows' own level first, the others merged into it."""
        out, lse = self._levels[-1].run(q, paged_kv_cache, return_lse=True)
        for level in self._levels[:-1]:
            self._merge(out, lse, *level.run(q, paged_kv_cache, return_lse=True))
        return out


def level_tables(slots: Tensor, forest: Forest) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Of each level, int32: where a node's queries and pages begin, the pages, and the tokens of a node's last one."""
    tables: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
    nodes, begin = 1, 0
    for count, tokens in forest.levels:
        nodes *= count
        rows = forest.batch // nodes
        starts = torch.arange(nodes + 1, dtype=torch.int32, device=slots.device)
        pages = slots[::rows, begin : begin + tokens].flatten()
        for table, part in zip(
            tables, (starts * rows, starts * tokens, pages, torch.ones_like(starts[1:])), strict=True
        ):
            table.append(part)
        begin += tokens
    return tables
