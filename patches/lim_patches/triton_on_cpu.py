"""SGLang 0.5.17 chooses Triton kernels by the attention backend's name, also on a CPU.

Symptom: `RuntimeError: 0 active drivers` at the first prefill of `--attention-backend lessismore` on a CPU, and with
    `--page-size` above 1 in the page allocator.
Cause: `support_triton(name)` and `get_last_loc` ask whether the name is one of a few known torch backends, not
    whether the device can run Triton.
Versions: below 0.5.22; later releases ask the platform.
Remove when: 0.5.17 is no longer supported.
"""

from collections.abc import Callable

import torch
from packaging.version import Version

TARGETS = ("sglang.srt.utils.common.support_triton", "sglang.srt.mem_cache.allocation.get_last_loc")


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return version < Version("0.5.22") and not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def no_triton(result: bool, backend: str) -> bool:
        return False

    def last_loc(original: Callable[..., torch.Tensor], *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        from sglang.srt.mem_cache.allocation import get_last_loc_torch

        return get_last_loc_torch(*args, **kwargs)

    HookRegistry.register(TARGETS[0], no_triton, HookType.AFTER)
    HookRegistry.register(TARGETS[1], last_loc, HookType.AROUND)
