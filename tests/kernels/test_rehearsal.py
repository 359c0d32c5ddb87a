"""Do kernels compile ahead, beside one another, and are they the ones that are launched afterwards?"""

from support.compiling import printed_by

SCRIPT = """
import torch
from triton.runtime.jit import JITFunction
from benchmarks.kernel_variants import use_absent_device
from lim_kernels import find_prefix_groups
from lim_kernels.prefix_groups.triton import shared_kernel, tree_kernel
from lim_kernels.rehearsal import rehearsed

use_absent_device(90)
run, compiled = JITFunction.run, []

def find(batch):
    slots, lens = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((batch, 4096), (batch,)))
    find_prefix_groups(slots, lens, granule=128)

with rehearsed(2) as found:
    for batch in (2, 9, 16, 17):
        find(batch)
assert JITFunction.run is run
assert len(found.raw_futures) == 4, len(found.raw_futures)
for kernel in (shared_kernel, tree_kernel):
    assert len(kernel.device_caches[0][0]) == 2, kernel
    assert all(hasattr(one, "asm") for one in kernel.device_caches[0][0].values())

try:
    with rehearsed(2):
        raise KeyError
except KeyError:
    assert JITFunction.run is run
print("done")
"""


def test_kernels_compile_ahead(tmp_path):
    assert printed_by("-c", SCRIPT, cache=tmp_path)[-1] == "done"
