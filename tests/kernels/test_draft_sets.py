"""Where drafts read: every implementation against an account in plain Python."""

import pytest
import torch

from lim_kernels import DraftMemory, DraftSizes, place_drafts

BUDGET, SINKS, ROOM, ROWS, WIDTH = 12, 2, 8, 7, 50


def memory_of(layers, heads, device, seed=0):
    """Random sets of rows that were `lengths` long."""
    generator = torch.Generator().manual_seed(seed)
    memory = DraftMemory.empty(layers, ROWS, heads, BUDGET, "cpu")
    memory.lengths.copy_(torch.tensor([0, 30, 30, 9, 14, 40, 25]))
    memory.tenants.copy_(torch.tensor([-1, 5, 1, 1, 1, 1, 0]))
    for row, length in enumerate(memory.lengths.tolist()):
        for layer in range(layers):
            for head in range(heads):
                count = min(BUDGET - layer - head, length)
                chosen = torch.randperm(max(length, 1), generator=generator)[:count].sort().values
                memory.sets[layer, row, head, :count] = chosen.int()
                memory.counts[layer, row, head] = count
    return DraftMemory(**{name: tensor.to(device) for name, tensor in vars(memory).items()})


def expected(memory, layer, head, row, tenant, slots, length):
    at = int(memory.lengths[row])
    if length <= BUDGET:
        positions = list(range(length))
    elif int(memory.tenants[row]) == tenant and 0 < length - at <= ROOM:
        count = int(memory.counts[layer, row, head])
        positions = memory.sets[layer, row, head, :count].tolist() + list(range(at, length))
    else:
        positions = [*range(SINKS), *range(length - BUDGET + SINKS, length)]
    return [int(slots[position]) for position in positions]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_places(implementation, device, heads, dtype):
    layers, sizes = 3, DraftSizes(BUDGET, SINKS, ROOM)
    memory = memory_of(layers, heads, device)
    # Padding, another tenant, a set, none yet needed, a set in a row that just outgrew the budget, too old, shrunk.
    rows, lens = [0, 1, 2, 3, 4, 5, 6, 2], [1, 33, 38, 12, 15, 49, 24, 39]
    tenants = torch.tensor([0, 6, 1, 1, 1, 1, 0], device=device)
    slots = torch.arange(1, 1 + len(rows) * WIDTH, dtype=torch.int32, device=device).view(len(rows), WIDTH)
    placed, ends = place_drafts(
        memory,
        torch.tensor(rows, dtype=dtype, device=device),
        tenants,
        slots,
        torch.tensor(lens, dtype=dtype, device=device),
        sizes,
        implementation=implementation,
    )
    assert placed.shape == (layers, len(rows), heads, sizes.width) and ends.shape == placed.shape[:3]
    for layer in range(layers):
        for head in range(heads):
            for item, (row, length) in enumerate(zip(rows, lens, strict=True)):
                wanted = expected(memory, layer, head, row, int(tenants[row]), slots[item], length)
                found = placed[layer, item, head].tolist()
                assert found[: int(ends[layer, item, head])] == wanted
                assert not any(found[len(wanted) :])


def test_a_view_of_wider_rows_is_read_by_its_stride(implementation, device):
    memory, sizes = memory_of(2, 1, device), DraftSizes(BUDGET, SINKS, ROOM)
    wide = torch.arange(3 * 80, dtype=torch.int32, device=device).view(3, 80)
    rows, tenants = torch.tensor([2, 4, 6], device=device), torch.ones(ROWS, dtype=torch.int64, device=device)
    lens = torch.tensor([33, 16, 44], device=device)
    whole = place_drafts(memory, rows, tenants, wide[:, :60].contiguous(), lens, sizes, implementation=implementation)
    part = place_drafts(memory, rows, tenants, wide[:, :60], lens, sizes, implementation=implementation)
    assert all(torch.equal(one, other) for one, other in zip(whole, part, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, 9)}, "slots int32"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows \[2\]"),
        ({"tenants": torch.zeros(ROWS)}, "tenants int64"),
        ({"sizes": DraftSizes(BUDGET + 1, SINKS, ROOM)}, "sets of 13 tokens"),
        ({"sizes": DraftSizes(BUDGET, SINKS, 0)}, "room for a token"),
        ({"implementation": "cuda"}, "implementation among"),
    ],
)
def test_wrong_operands_are_named(change, message):
    given = {
        "memory": memory_of(1, 1, "cpu"),
        "rows": torch.tensor([1, 2]),
        "tenants": torch.zeros(ROWS, dtype=torch.int64),
        "slots": torch.zeros(2, 40, dtype=torch.int32),
        "seq_lens": torch.tensor([20, 20]),
        "sizes": DraftSizes(BUDGET, SINKS, ROOM),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        place_drafts(**given)
