"""Do the kernels that reserve KV slots compile before requests come, for every batch that can come?"""

import pytest

from support.compiling import printed_by

SCRIPT = """
import torch
from lim_kernels.rehearsal import rehearsed, use_absent_device
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocation import assign_req_to_token_pool, assign_req_to_token_pool_func
from sglang.srt.mem_cache.allocator.paged import alloc_extend_kernel
from sglang.srt.utils import next_power_of_2
from sglang.kernels.ops.memory.common import get_last_loc_kernel, get_last_loc_triton
from sgl_lim.serving.lossless.reservations import compile_reservations

use_absent_device(90)
allocation.get_last_loc = get_last_loc_triton
table, page, most = torch.zeros(50, 4096, dtype=torch.int32), {page}, 37
compile_reservations(table, page, most)

kernels = [assign_req_to_token_pool, *((alloc_extend_kernel, get_last_loc_kernel) if page > 1 else ())]
count = lambda: [len(kernel.device_caches[0][0]) for kernel in kernels]
ready = count()
print(ready)
with rehearsed():
    for batch in range(1, most + 1):
        rows = torch.arange(batch)
        now, then = (torch.full((batch,), length, dtype=torch.int32) for length in (100, 114))
        for taken in range(4):
            free = torch.arange(1000)[taken:]
            slots = free[: 14 * batch]
            if page > 1:
                last, slots = get_last_loc_triton(table, rows, now), torch.empty(14 * batch, dtype=torch.int64)
                alloc_extend_kernel[(batch,)](now, then, last, free, slots, next_power_of_2(batch), page)
            assign_req_to_token_pool_func(rows, table, now, then, slots, batch)
assert count() == ready, (count(), ready)
print("done")
"""


@pytest.mark.parametrize(("page", "kernels"), [(1, [14]), (16, [7, 7, 3])])
def test_no_round_waits_for_a_kernel_that_reserves_its_slots(page, kernels, tmp_path):
    printed = printed_by("-c", SCRIPT.replace("{page}", str(page)), cache=tmp_path)
    assert printed[-2:] == [str(kernels), "done"]
