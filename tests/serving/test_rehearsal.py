"""Is what a backend would launch rehearsed from its own state, without memory and without other ranks?"""

from support.compiling import printed_by

SCRIPT = """
import torch
from benchmarks.kernel_variants import use_absent_device, variants
from sgl_lim.serving.rehearsal import stage_of
from support.fake_backend import build, runner_of

use_absent_device(90)
table = torch.zeros(6, 90, dtype=torch.int32)
for values in ({}, {"selection_attends": "set", "aggregate": "max"}, {"early_sets": True}, {"selection_interval": 3}):
    lim = build(table, **values).lim
    stage = stage_of(lim, runner_of(table))
    counts = variants(stage, [1, 2, 5])
    assert counts["split_kernel"] and counts["emit_kernel"] and counts["count_decode_step_kernel"], counts
    assert lim.plan is None and lim.counters.read()["decode_steps"] == 0
    assert bool(counts["keep_kernel"]) == (lim.kept_sets is not None), counts

# Without a budget that a row could outgrow, nothing selects.
assert "emit_kernel" not in variants(stage_of(build(table, budget=400).lim, runner_of(table)), [2])
print("done")
"""


def test_a_backend_s_launches_are_rehearsed():
    assert printed_by("-c", SCRIPT)[-1] == "done"
