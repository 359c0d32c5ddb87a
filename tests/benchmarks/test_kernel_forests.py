"""The kernel benchmark's section of shared prefixes, without a GPU: its operands, its rows and FlashInfer's tables."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernel_times import CPU, TINY, CountingTimer, dense, of
from torch import Tensor

from benchmarks import kernel_forests
from benchmarks.forest import Forest
from benchmarks.kernel_forests import draw_forest, flashinfer_cascades, groups_deviation, level_tables, stored_tokens
from benchmarks.kernel_operands import Operands, Pool, Shape, attend_and_score
from benchmarks.kernel_sections import Bench, Row
from benchmarks.kernel_times import parse
from lim_kernels import Scaling, find_prefix_groups
from lim_kernels.attention import attend

SHAPE = Shape(4, 2, 8, torch.float32)
TREE = Forest.parse("1x12/2x8/3x5")


def drawn(forest: Forest = TREE) -> Operands:
    return draw_forest(Pool(SHAPE, SHAPE.slot_sets(stored_tokens(forest)) * stored_tokens(forest), CPU), forest)


def rows(cascades: dict[str, Any] | None = None, fa3: Any = dense) -> list[Row]:
    args = parse([*TINY, "fp32", "--sections", "grouped"])
    return list(Bench(args, CPU, CountingTimer(), fa3, None, cascades).rows())


def like_cascade(operands: Operands, forest: Forest) -> list[Callable[[], tuple[Tensor]]]:
    """A baseline in the cascade's place."""
    return dense(operands)


def test_rows_share_the_slots_of_their_nodes_and_nothing_else() -> None:
    assert stored_tokens(TREE) == 12 + 2 * 8 + 6 * 5
    operands = drawn()
    for slots in operands.slots:
        assert slots.shape == (6, 25) and slots.dtype == torch.int32
        assert len(slots.unique()) == stored_tokens(TREE) and int(slots.min()) >= 1
        assert len(slots[:, :12].unique(dim=0)) == 1
        assert [len(part[:, 12:20].unique(dim=0)) for part in (slots[:3], slots[3:])] == [1, 1]
        assert len(slots[:, 20:].unique()) == 30 and not set(slots[0, 12:20].tolist()) & set(slots[3, 12:20].tolist())
    assert len(torch.stack(operands.slots).unique()) == len(operands.slots) * stored_tokens(TREE)
    groups = find_prefix_groups(operands.slots[0], operands.lens, granule=4)
    assert int(groups.already_read.sum()) == 6 * 25 - stored_tokens(TREE)


def test_the_rows_of_a_forest() -> None:
    found = rows({"flashinfer": like_cascade})
    tree, plain = of(found, prefixes="1x40"), of(found, prefixes="", section="grouped")
    kernels = [
        ("find_prefix_groups", "reference"),
        ("grouped_decode", "reference"),
        ("sparse_decode over all slots", "reference"),
        ("dense decode", "fa3"),
        ("cascade", "flashinfer"),
        ("score_context", "reference"),
        *[("grouped_decode + score_tokens + choose_tokens", "reference")] * 2,
        *[("score_context + score_tokens + choose_tokens + sparse_decode", "reference")] * 2,
    ]
    for of_forest in (tree, plain):
        assert [(row["op"], row["implementation"]) for row in of_forest] == kernels
        assert {row["error"] for row in of_forest} == {""} and all(row["us"] == 10 for row in of_forest)
        assert {row["ratio_to_fa3"] for row in of_forest} == {"", 1.0}
    assert {(row["batch"], row["context"]) for row in tree} == {(3, 48)}
    assert {(row["batch"], row["context"]) for row in plain} == {(4, 20)}
    assert tree[1]["note"] == "64 tokens stored, 144 attended; 64 read"
    # All of them beside the same work: what is stored, once.
    stored, sets = 2 * 64 * 2 * 8 * 4, 2 * 3 * 16 * 2 * 8 * 4
    assert {row["gb_per_s"] for row in tree[1:5] + tree[6:8]} == {round(stored / 10 / 1e3, 1)}
    # Keys alone, and beside them what the rows choose.
    assert tree[5]["gb_per_s"] == round(stored / 2 / 10 / 1e3, 1)
    assert {row["gb_per_s"] for row in tree[8:]} == {round((stored / 2 + sets) / 10 / 1e3, 1)}
    assert [row["aggregate"] for row in tree[6:]] == ["max", "union"] * 2
    assert plain[1]["note"] == "80 tokens stored, 80 attended; 80 read" and tree[0]["gb_per_s"] == ""


def test_a_cascade_that_is_wrong_or_fails_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(operands: Operands, forest: Forest) -> list[Callable[[], tuple[Tensor]]]:
        return [lambda call=call: (call()[0] * 1.05,) for call in dense(operands)]  # type: ignore[misc]

    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer.cascade", None)
    found = rows({"wrong": wrong, **flashinfer_cascades(SHAPE)}, fa3=None)
    assert {row["error"] for row in of(found, implementation="wrong")} == {"check failed"}
    for name in ("flashinfer auto", "flashinfer fa2"):
        errors = [row["error"] for row in of(found, implementation=name)]
        assert len(errors) == 2 and all("flashinfer" in error for error in errors)
    assert {row["error"] for row in of(found, implementation="reference")} == {""}
    assert not of(found, implementation="fa3") and {row["ratio_to_fa3"] for row in found} == {""}


def test_a_forest_that_cannot_be_set_up_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(pool: Pool, forest: Forest) -> Operands:
        if forest.prefixes:
            raise torch.OutOfMemoryError("large")
        return draw_forest(pool, forest)

    monkeypatch.setattr("benchmarks.kernel_sections.draw_forest", draw)
    found = rows()
    assert [(row["op"], row["prefixes"]) for row in of(found, error="out of memory")] == [("grouped", "1x40")]
    assert len(of(found, section="grouped", error="")) == 4 + 1 + 2 * 2


def test_groupings_differ_by_every_defined_entry() -> None:
    operands = drawn()
    groups = find_prefix_groups(operands.slots[0], operands.lens, granule=4)
    assert groups_deviation(groups, groups) == 0
    ends = groups.ends.clone()
    ends[int(groups.counts.argmax())] -= 4
    assert groups_deviation(replace(groups, ends=ends), groups) > 0
    members = groups.members.clone()
    group = int(groups.counts.argmin())  # a row without a group: its members are undefined
    assert int(groups.counts[group]) == 0
    members[group] = -7
    assert groups_deviation(replace(groups, members=members), groups) == 0


class FakeLevel:
    """`BatchPrefillWithPagedKVCacheWrapper` on the CPU, as far as levels need it."""

    def __init__(self, workspace: Tensor, layout: str, backend: str = "auto") -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.backend = backend

    def plan(self, qo: Tensor, kv: Tensor, pages: Tensor, last: Tensor, **sizes: Any) -> None:
        assert (
            sizes["page_size"] == 1
            and sizes["head_dim_qk"] == 8
            and len(last) == len(qo) - 1
            and bool((last == 1).all())
        )
        self.qo, self.kv, self.pages, self.scale = qo.tolist(), kv.tolist(), pages, sizes["sm_scale"]

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], return_lse: bool) -> tuple[Tensor, Tensor]:
        keys, values = (cache.squeeze(1) for cache in caches)
        outs = []
        for node in range(len(self.qo) - 1):
            rows = q[self.qo[node] : self.qo[node + 1]]
            pages = self.pages[self.kv[node] : self.kv[node + 1]].expand(len(rows), -1)
            lens = torch.full((len(rows),), pages.shape[1])
            outs.append(attend(rows, keys, values, pages, lens, Scaling(self.scale)))
        return torch.cat([out for out, _, _ in outs]), torch.cat([lse for _, lse, _ in outs])


class FakeCascade:
    """FlashInfer's own cascade: levels of the same kind, planned positionally."""

    def __init__(self, levels: int, workspace: Tensor, layout: str) -> None:
        self.chosen = kernel_forests.ChosenCascade(levels, workspace, "auto")

    def plan(self, *given: Any, **sizes: Any) -> None:
        self.chosen.plan(*given, **sizes)

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        return self.chosen.run(q, caches)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    both = torch.logaddexp(lse, other_lse)
    out.copy_(out * (lse - both).exp().unsqueeze(2) + other * (other_lse - both).exp().unsqueeze(2))
    lse.copy_(both)


@pytest.mark.parametrize("name", ["flashinfer auto", "flashinfer fa2"])
@pytest.mark.parametrize("text", ["1x12/2x8/3x5", "2x8/1x4", "3x7"])
def test_the_levels_handed_to_flashinfer_are_the_forests(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeLevel, merge_state_in_place=merge)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    cascade = SimpleNamespace(MultiLevelCascadeAttentionWrapper=FakeCascade)
    monkeypatch.setitem(sys.modules, "flashinfer.cascade", cascade)
    operands = drawn(Forest.parse(text))
    calls = flashinfer_cascades(SHAPE)[name](operands, Forest.parse(text))
    assert len(calls) == len(operands.slots) * len(operands.caches)
    for call, theirs in zip(calls, operands.calls(attend_and_score), strict=True):
        wanted = theirs()
        assert isinstance(wanted, tuple)
        torch.testing.assert_close(call()[0], wanted[0])


def test_tables_of_a_level() -> None:
    slots = drawn().slots[0]
    queries, starts, pages, last = level_tables(slots, TREE)
    assert [table.tolist() for table in queries] == [[0, 6], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert [table.tolist() for table in starts] == [[0, 12], [0, 8, 16], [0, 5, 10, 15, 20, 25, 30]]
    assert pages[1].tolist() == [*slots[0, 12:20].tolist(), *slots[3, 12:20].tolist()]
    assert [len(table) for table in last] == [1, 2, 6] and all(table.dtype == torch.int32 for table in pages)
