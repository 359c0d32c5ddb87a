"""SGLang 0.5.17 chooses Triton kernels by the attention backend's name, also on a CPU.

Symptom: `RuntimeError: 0 active drivers` at the first prefill of `--attention-backend lessismore` on a CPU.
Cause: `support_triton(name)` asks whether the name is one of a few known torch backends, not whether the device can
    run Triton.
Versions: below 0.5.22; later releases ask the platform.
Remove when: 0.5.17 is no longer supported.
"""

import torch
from packaging.version import Version

TARGETS = ("sglang.srt.utils.common.support_triton",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return version < Version("0.5.22") and not torch.accelerator.is_available()


def register() -> None:
    """Register the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def no_triton(result: bool, backend: str) -> bool:
        return False

    HookRegistry.register(TARGETS[0], no_triton, HookType.AFTER)
