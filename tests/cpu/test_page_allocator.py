"""The torch page allocator hands out what SGLang's Triton kernels would: page-aligned, disjoint, in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

paged = pytest.importorskip("sglang.srt.mem_cache.allocator.paged")
if hasattr(paged, "alloc_decode_naive"):
    pytest.skip("this SGLang release has a torch page allocator of its own", allow_module_level=True)

from sgl_lim.cpu.page_allocator import TorchPagedAllocator  # noqa: E402

PAGE = 4


def build(pages: int) -> TorchPagedAllocator:
    return TorchPagedAllocator(pages * PAGE, PAGE, torch.float32, "cpu", kvcache=None, need_sort=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 11), st.integers(0, 6)), min_size=1, max_size=4))
def test_slots_continue_their_pages(requests):
    """Each request is prefilled with n tokens and then decodes m, in lockstep with the others."""
    allocator = build(40)
    lens = torch.tensor([n for n, _ in requests])
    zeros = torch.zeros_like(lens)
    free = allocator.available_size()
    slots = allocator.alloc_extend(zeros, zeros, lens, lens, zeros - 1, int(lens.sum()))
    rows = [part.tolist() for part in slots.split(lens.tolist())]
    for step in range(6):
        active = [i for i, (_, m) in enumerate(requests) if step < m]
        if not active:
            break
        grown = torch.tensor([len(rows[i]) + 1 for i in active])
        last = torch.tensor([rows[i][-1] for i in active], dtype=torch.int32)
        for i, slot in zip(active, allocator.alloc_decode(grown, grown, last).tolist(), strict=True):
            rows[i].append(slot)
    used = [slot for row in rows for slot in row]
    assert len(set(used)) == len(used) and min(used) >= PAGE
    for row in rows:
        for position, slot in enumerate(row):
            assert slot % PAGE == position % PAGE
            assert position % PAGE == 0 or slot == row[position - 1] + 1
    assert allocator.available_size() == free - sum(-(-len(row) // PAGE) for row in rows) * PAGE


def test_running_out_of_pages_returns_none_and_takes_nothing():
    allocator = build(2)
    lens = torch.tensor([9])
    zero = torch.tensor([0])
    assert allocator.alloc_extend(zero, zero, lens, lens, zero - 1, 9) is None
    assert allocator.available_size() == 2 * PAGE
    eight = torch.tensor([8])
    slots = allocator.alloc_extend(zero, zero, eight, eight, zero - 1, 8)
    assert allocator.alloc_decode(lens, lens, slots[-1:]) is None
