"""SGLang handles KV slots by Triton on a plain CPU too: where it allocates pages, and for a speculative algorithm.

Symptom: `RuntimeError: 0 active drivers` with `--page-size` above 1, and with a speculative algorithm when its KV pool
    is made (0.5.23) and at its first decode step.
Cause: `get_last_loc` asks whether the attention backend's name is one of a few known ones. The others ask whether
    SGLang's own CPU engine is on. None asks whether the device has Triton.
Versions: all supported. For ordinary decoding 0.5.22 and later ask the platform.
Remove when: SGLang asks the platform for a speculative algorithm too.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

TARGETS = (
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
    "sglang.srt.mem_cache.allocation.get_last_loc",
)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], assign, HookType.AROUND)
    HookRegistry.register(TARGETS[1], copy_nothing, HookType.AROUND)
    HookRegistry.register(TARGETS[2], last_loc, HookType.AROUND)


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


def last_loc(original: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The slot of the last token of each row."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args, **kwargs)
