"""Platform entry point: SGLang on a plain CPU where no accelerator is found.

Without CUDA, SGLang's `--device cpu` needs Intel AMX kernels or an out-of-tree platform; with neither, rotary
embedding asks for vllm. The platform here runs every custom operator through its "native" (torch) path.
"""

import os

_PLATFORM_CLASS = "sgl_lim.cpu.platform_class.PlainCpuPlatform"


def activate() -> str | None:
    """Entry point of the group `sglang.srt.platforms`.

    Returns:
        The platform class's dotted name, or None where an accelerator is present or SGLang's own CPU engine was
        asked for (`SGLANG_USE_CPU_ENGINE=1`), which leaves the choice to SGLang.
    """
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.accelerator.is_available():
        return None
    return _PLATFORM_CLASS
