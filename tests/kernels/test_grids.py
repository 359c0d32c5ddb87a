"""Do grids follow what rows may have, not how wide the pool's rows are, and give every row all it had before?"""

import pytest
import torch

from lim_kernels import (
    SetSizes,
    adapt_budgets,
    bound_pages,
    choose_for_groups,
    choose_tokens,
    find_prefix_groups,
    score_pages,
    score_tokens,
    triton_support,
)
from lim_kernels.adaptive_budget import triton as counting
from lim_kernels.page_bounds import PAGE, PageBounds
from lim_kernels.rehearsal import MULTIPROCESSORS
from lim_kernels.select_tokens import triton, triton_choose, triton_union
from support.launches import decode_step, launches_recorded

pytestmark = pytest.mark.usefixtures("triton_runs")
TRITON = {"implementation": "triton"}
LENS = (401, 32, 300)
SIZES = SetSizes(32, recent=8, sinks=2)


def launches_of(batch, width):
    """The launches of a step by kernel, and by place among the kernel's launches."""
    with launches_recorded() as launches:
        decode_step(batch, width)
    found, seen = {}, {}
    for launch in launches:
        place = seen[launch.kernel] = seen.get(launch.kernel, 0) + 1
        found[launch.kernel, place] = launch
    return found


@pytest.mark.parametrize("batch", [1, 16, 64, 256])
def test_wider_rows_of_the_pool_start_few_programs_more(batch):
    narrow, wide = launches_of(batch, 40_976), launches_of(batch, 131_088)
    assert narrow.keys() == wide.keys() and len(narrow) > 20
    for name, launch in wide.items():
        # Either as many as before, or what fills the device.
        assert launch.programs <= max(narrow[name].programs, 32 * MULTIPROCESSORS), name


def test_a_step_of_64_rows_starts_a_quarter_more_programs_in_a_pool_three_times_as_wide():
    counts = [sum(launch.programs for launch in launches_of(64, width).values()) for width in (40_976, 131_088)]
    assert counts[1] <= 1.25 * counts[0]


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs to a line, whatever the device has, and small blocks, so that each takes several in turn."""
    small = {triton: ["_BLOCK"], counting: ["_BLOCK"], triton_union: ["READ"]}
    small[triton_choose] = ["_BLOCK", "_FEW", "_GATHERED"]
    for module, names in small.items():
        for name in names:
            monkeypatch.setattr(module, name, 64)
    monkeypatch.setattr(triton_support, "_PROGRAMS_A_LINE", 2)
    monkeypatch.setattr(triton_support, "_PROGRAMS_A_MULTIPROCESSOR", 0)


def rows(device, seed=0):
    """int32 lengths, and float32 [B, L] noise that is NaN beyond them."""
    noise = torch.randn(len(LENS), max(LENS), generator=torch.Generator().manual_seed(seed))
    lens = torch.tensor(LENS, dtype=torch.int32)
    return lens.to(device), noise.masked_fill(torch.arange(max(LENS)) >= lens.unsqueeze(1), float("nan")).to(device)


@pytest.mark.parametrize("aggregate", ["union", "max", "sum"])
def test_scores_do_not_depend_on_the_number_of_programs(device, few_programs, monkeypatch, aggregate):
    lens, noise = rows(device)
    logits = torch.stack([noise, noise.abs()], dim=1)
    scores = score_tokens(logits, lens, SIZES, aggregate=aggregate, **TRITON)
    monkeypatch.undo()
    expected = score_tokens(logits, lens, SIZES, aggregate=aggregate, **TRITON)
    for row, length in enumerate(LENS):
        if length > SIZES.budget:
            assert torch.equal(scores[row, :length], expected[row, :length])


@pytest.mark.parametrize("kind", ["random", "ties", "one-bin"])
def test_sets_do_not_depend_on_the_number_of_programs(device, few_programs, monkeypatch, kind):
    lens, noise = rows(device)
    scores = {"random": noise, "ties": noise.round(), "one-bin": noise * 1e-6 - 3.0}[kind]
    slots = torch.arange(scores.numel(), dtype=torch.int32, device=device).view(scores.shape)

    def results():
        yield from choose_tokens(scores, lens, SIZES, slots=slots, **TRITON)
        yield from choose_tokens(scores, lens, SetSizes(350, recent=9, sinks=0), **TRITON)

    assert_same_results(results, monkeypatch)


def test_sets_of_groups_and_budgets_do_not_depend_on_the_number_of_programs(device, few_programs, monkeypatch):
    lens, scores = rows(device)
    slots = torch.arange(scores.numel(), dtype=torch.int32, device=device).view(scores.shape)
    slots[:, :192] = slots[0, :192]
    groups = find_prefix_groups(slots, torch.where(lens > SIZES.budget, lens, 1), granule=64, **TRITON)
    assert groups.counts.any()

    def results():
        yield from choose_for_groups(scores, lens, groups, SIZES, combine="max", slots=slots, **TRITON)
        yield from adapt_budgets(scores - 9, lens, SIZES, top_p=0.5, **TRITON)

    assert_same_results(results, monkeypatch)


def assert_same_results(results, monkeypatch):
    """With few programs and small blocks, and without."""
    few = list(results())
    monkeypatch.undo()
    for result, expected in zip(few, results(), strict=True):
        assert torch.equal(result, expected)


def test_scores_of_pages_do_not_depend_on_the_number_of_programs(device, few_programs, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1 << 11, 2, 8, generator=generator).to(device)
    bounds = PageBounds(*(torch.zeros(len(keys) // PAGE, 2, 8, device=device) for _ in range(2)))
    bound_pages(bounds, keys, torch.arange(len(keys), dtype=torch.int32, device=device), **TRITON)
    slots = torch.arange(len(keys), dtype=torch.int32, device=device).expand(2, -1)
    q, lens = torch.randn(2, 4, 8, generator=generator).to(device), torch.tensor([2040, 1200], device=device)
    scores = score_pages(q, bounds, slots, lens, score_beyond=32, **TRITON)
    monkeypatch.undo()
    expected = score_pages(q, bounds, slots, lens, score_beyond=32, **TRITON)
    for row, length in enumerate(lens.tolist()):
        assert torch.equal(scores[row, :, : -(-length // PAGE)], expected[row, :, : -(-length // PAGE)])
