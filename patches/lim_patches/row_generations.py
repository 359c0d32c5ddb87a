"""SGLang 0.5.17 counts the tenants of request rows from zero again when its cache is flushed.

Symptom: after `/flush_cache` the next tenant of a row can have the generation of an earlier one, so what was kept for
    that one would be taken for its own.
Cause: `clear` of both request pools zeroes `req_generation`; later releases keep it growing, for this very reason.
Versions: below 0.5.22.
Remove when: 0.5.17 is no longer supported.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version

TARGETS = (
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.clear",
    "sglang.srt.disaggregation.decode.DecodeReqToTokenPool.clear",
)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return version < Version("0.5.22")


def register() -> None:
    """Register the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in TARGETS:
        HookRegistry.register(target, keep_generations, HookType.AROUND)


def keep_generations(clear: Callable[..., None], pool: Any, *args: object, **kwargs: object) -> None:
    """Run `clear` on a request pool, and give its rows the generations that they had."""
    generations = pool.req_generation.clone()
    clear(pool, *args, **kwargs)
    pool.req_generation.copy_(generations)
