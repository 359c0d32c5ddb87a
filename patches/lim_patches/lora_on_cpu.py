"""SGLang pins the host memory that it copies LoRA adapters and their batches from, also where no device reads it.

Symptom: on a plain CPU, `--enable-lora` ends the server with `Found no NVIDIA driver on your system`.
Cause: `LoRAManager`, its layers and its `torch_native` backend ask torch for pinned memory without asking the platform.
Versions: all supported.
Remove when: they ask `is_pin_memory_available`.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"
TARGETS = tuple(
    f"{_MANAGER}.{name}"
    for name in (
        *("__init__", "prepare_lora_batch", "fetch_new_loras"),
        *("load_lora_adapter", "load_lora_adapter_from_tensors"),
    )
)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in TARGETS:
        HookRegistry.register(target, unpinned, HookType.AROUND)


def unpinned(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `original`; the tensors that it makes are in pageable memory."""
    with Pageable():
        return original(*args, **kwargs)


class Pageable(TorchFunctionMode):
    """A context in which torch pins no memory, whoever asks for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call of torch."""
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})
