"""Does every kernel compile for the GPUs that SGLang serves on, within their shared memory? No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a block may have, by compute capability. 8.0 has more than 8.9, and no launch that 8.9 has not."""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_as_launched(capability, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env=variables | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    declared = {report["declared"] for report in reports if "declared" in report}
    launches = [report for report in reports if "kernel" in report]
    assert declared and {launch["kernel"] for launch in launches} == declared
    too_large = [launch for launch in launches if launch["shared"] > SHARED_BYTES[capability]]
    assert not too_large
