"""Does the row snapshot hold each row's tokens and lengths, and do only they get written?"""

import pytest
import torch

from lim_kernels import copy_rows

LENS = (1, 2047, 2048, 2049, 5000, 1)


def snapshot(device, implementation, index_dtype, width=5100):
    """Copies rows of a table that is a view of a wider one into a view of a buffer of -7."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(1, 1 << 30, (9, 5300), generator=generator, dtype=torch.int32).to(device)[:, :5200]
    # The last row pads a captured graph.
    rows = torch.tensor([3, 8, 1, 7, 5, 0], dtype=index_dtype, device=device)
    seq_lens = torch.tensor(LENS, dtype=index_dtype, device=device)
    buffer = torch.full((8, width + 20), -7, dtype=torch.int32, device=device)
    lens = torch.full((8,), -7, dtype=torch.int32, device=device)
    slots = buffer[: len(LENS), :width]
    copy_rows(table, rows, seq_lens, slots, lens[: len(LENS)], longest=5050, implementation=implementation)
    return table, rows, buffer, lens


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_and_lengths_are_copied(implementation, device, index_dtype):
    table, rows, buffer, lens = snapshot(device, implementation, index_dtype)
    assert lens.tolist() == [*LENS, -7, -7]
    for item, (row, length) in enumerate(zip(rows.tolist(), LENS, strict=True)):
        assert torch.equal(buffer[item, :length], table[row, :length])
    assert (buffer[len(LENS) :] == -7).all() and (buffer[:, 5050:] == -7).all()


def test_triton_writes_nothing_after_a_row_s_tokens(device, triton_runs):
    _, _, buffer, _ = snapshot(device, "triton", torch.int64)
    for item, length in enumerate(LENS):
        assert (buffer[item, length:] == -7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows, seq_lens, lens \[B\]"),
        ({"slots": torch.zeros(3, 8, dtype=torch.int32)}, r"slots \[2, W\]"),
        ({"lens": torch.zeros(2, dtype=torch.int64)}, "int32 table, slots and lens"),
        ({"longest": 9}, "longest at most 8"),
        ({"implementation": "memcpy"}, "implementation among"),
    ],
    ids=["rows", "slots", "dtype", "longest", "implementation"],
)
def test_bad_operands_are_named(change, message):
    call = {
        "table": torch.zeros(4, 10, dtype=torch.int32),
        "rows": torch.zeros(2, dtype=torch.int64),
        "seq_lens": torch.ones(2, dtype=torch.int64),
        "slots": torch.zeros(2, 8, dtype=torch.int32),
        "lens": torch.zeros(2, dtype=torch.int32),
        "longest": 8,
    } | change
    with pytest.raises(ValueError, match=message):
        copy_rows(**call)
