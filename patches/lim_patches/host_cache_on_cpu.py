"""SGLang's hierarchical cache copies KV to and from host memory by CUDA alone.

Symptom: on a plain CPU, `--enable-hierarchical-cache` fails when the host pool is made (`Torch not compiled with CUDA
    enabled`, or a CUDA error), and would fail at its first copy.
Cause: the host pool registers its memory with CUDA, and copies by kernels that only a GPU's build imports.
Versions: all supported.
Remove when: SGLang copies by torch where there is no GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

_POOL = "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost"
TARGETS = (
    "sglang.srt.mem_cache.pool_host.common._cuda_host_register",
    f"{_POOL}.load_to_device_per_layer",
    f"{_POOL}.backup_from_device_all_layer",
)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], leave_pageable, HookType.AROUND)
    HookRegistry.register(TARGETS[1], load_layer, HookType.AROUND)
    HookRegistry.register(TARGETS[2], back_up, HookType.AROUND)


def leave_pageable(original: Callable[..., None], *args: object, **kwargs: object) -> None:
    """There is no device to register host memory for."""


def load_layer(
    original: Callable[..., None],
    host: Any,
    pool: Any,
    host_indices: Tensor,
    device_indices: Tensor,
    layer_id: int,
    *args: object,
    **kwargs: object,
) -> None:
    """Copy one layer's keys and values of tokens, whose indices are integer [N] on both sides, from the host pool."""
    for there, here in _sides(host, pool):
        here[layer_id][device_indices.long()] = there[layer_id][host_indices.long()]


def back_up(
    original: Callable[..., None], host: Any, pool: Any, host_indices: Tensor, device_indices: Tensor, *args: object
) -> None:
    """Copy the keys and values of tokens in all layers into the host pool; indices as in `load_layer`."""
    for there, here in _sides(host, pool):
        for host_layer, layer in zip(there, here, strict=True):
            host_layer[host_indices.long()] = layer[device_indices.long()]


def _sides(host: Any, pool: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Keys and values, [N, H_kv, D] a layer, of the host pool and of the KV pool.

    Raises:
        ValueError: the host pool does not keep tokens apart.
    """
    if host.layout not in ("layer_first", "page_first"):
        raise ValueError(f"--hicache-mem-layout {host.layout} is for GPUs; on a CPU use layer_first or page_first")
    return (host.k_data_refs, pool.k_buffer), (host.v_data_refs, pool.v_buffer)
