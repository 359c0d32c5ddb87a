"""SGLang writes slots of speculative tokens by Triton on a plain CPU too, and warms up a copy of KV that trees need.

Symptom: `RuntimeError: 0 active drivers` when the KV pool of a speculative algorithm is made on a CPU (0.5.23), and at
    its first decode step.
Cause: `assign_req_to_token_pool_func` and `copy_all_layer_kv_cache_func` ask whether SGLang's own CPU engine is on, not
    whether the device has Triton.
Versions: all supported.
Remove when: SGLang asks the platform, as it does for `alloc_extend` since 0.5.22.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

TARGETS = (
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], assign, HookType.AROUND)
    HookRegistry.register(TARGETS[1], copy_nothing, HookType.AROUND)


def assign(
    original: Callable[..., None],
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write slots, row after row of the batch, to places `start_offset` to `end_offset` of its rows, integer [B]."""
    counts = (end_offset - start_offset).long()
    before = counts.cumsum(0) - counts
    places = torch.arange(int(counts.sum())) + (start_offset - before).repeat_interleave(counts)
    req_to_token[req_pool_indices.long().repeat_interleave(counts), places] = out_cache_loc.to(req_to_token.dtype)


def copy_nothing(original: Callable[..., None], pool: Any) -> None:
    """Leave the pool without a copy of KV, as it is without a speculative algorithm: moving KV then fails by name."""
    pool._kv_copy_config = None
