"""Compiles the kernels by which SGLang reserves KV slots for a round, before requests come.

Only speculation launches them. SGLang compiles them as they come: one for each power of two of the batch size, and
another where free slots begin at an odd place. Each makes a round wait for 50 to 100 ms, once on a machine.
"""

import torch
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator.paged import alloc_extend_kernel
from torch import Tensor

from sgl_lim.serving.rehearsal import rehearsed_for


def compile_reservations(table: Tensor, page: int, most_rows: int) -> None:
    """Compile for batches of up to `most_rows` requests; nothing runs.

    Args:
        table: int32 [R, T], SGLang's `ReqToTokenPool.req_to_token`, on a GPU.
        page: KV slots of a page.
    """
    with rehearsed_for("reserving KV slots"):
        for power in range((most_rows - 1).bit_length() + 1):
            _reserve(table, page, rows=2**power)


def _reserve(table: Tensor, page: int, rows: int) -> None:
    """What `alloc_for_spec_decode` of SGLang 0.5.17 and 0.5.23 launches for so many rows."""
    indices = torch.zeros(rows, dtype=torch.int64, device=table.device)
    lens = torch.zeros(rows, dtype=torch.int32, device=table.device)
    slots = torch.zeros(2, dtype=torch.int64, device=table.device)
    if page > 1:
        last = allocation.get_last_loc(table, indices, lens)
        alloc_extend_kernel[(rows,)](lens, lens, last, slots, slots, rows, page)
        starts = [slots]
    else:
        # Slots are then a part of the list of free ones. Triton tells addresses apart by whether 16 divides them.
        starts = [slots, slots[1:]]
    for start in starts:
        allocation.assign_req_to_token_pool_func(indices, table, lens, lens, start, rows)
