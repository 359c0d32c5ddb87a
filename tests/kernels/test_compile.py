"""Does every kernel compile for the GPUs that SGLang serves on, within their shared memory? No GPU is needed."""

import json
from pathlib import Path

import pytest

from support.compiling import printed_by

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a block may have, by compute capability. 8.0 has more than 8.9, and no launch that 8.9 has not."""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_as_launched(capability, tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    reports = [json.loads(line) for line in printed_by(script, str(capability), cache=tmp_path)]
    declared = {report["declared"] for report in reports if "declared" in report}
    launches = [report for report in reports if "kernel" in report]
    assert declared and {launch["kernel"] for launch in launches} == declared
    too_large = [launch for launch in launches if launch["shared"] > SHARED_BYTES[capability]]
    assert not too_large
