"""Row snapshot in Triton: one launch, and only the tokens that are there are moved."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def copy_rows_kernel(
    table_ptr,
    rows_ptr,
    seq_lens_ptr,
    slots_ptr,
    lens_ptr,
    stride_table,
    stride_slots,
    BLOCK: tl.constexpr,
):
    """Copy one block of one row."""
    block = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens_ptr + item).to(tl.int32)
    if block == 0:
        tl.store(lens_ptr + item, length)
    if block * BLOCK >= length:
        return
    positions = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + item).to(tl.int64)
    slots = tl.load(table_ptr + row * stride_table + positions, mask=positions < length)
    tl.store(slots_ptr + item * stride_slots + positions, slots, mask=positions < length)


def copy_rows(table: Tensor, rows: Tensor, seq_lens: Tensor, slots: Tensor, lens: Tensor, *, longest: int) -> None:
    """See `api.copy_rows`."""
    copy_rows_kernel[(triton.cdiv(longest, _BLOCK), len(rows))](
        table_ptr=table,
        rows_ptr=rows,
        seq_lens_ptr=seq_lens,
        slots_ptr=slots,
        lens_ptr=lens,
        stride_table=table.stride(0),
        stride_slots=slots.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )
