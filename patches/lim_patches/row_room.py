"""Rows of the request pool are too short for the slots that a long chain of drafts reserves at the context's end.

Symptom: with 7 drafts or more and `--page-size 1`, a request that decodes up to the end of the model's context has the
    slots of its last rounds written into the row of another request.
Cause: two rounds' slots are reserved past a request's committed tokens (`get_alloc_reserve_per_decode`), but
    `get_req_to_token_extra_context_len` leaves room for one round and four tokens unless pages are larger.
Versions: all supported. 0.5.23 leaves the room for its own UNO.
Remove when: SGLang leaves the room at every page size and for every algorithm.
"""

from typing import Any

from packaging.version import Version

_SIZING = "sglang.srt.mem_cache.allocation_sizing"
TARGETS = (f"{_SIZING}.get_req_to_token_extra_context_len",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register() -> None:
    """Register the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], at_least_what_is_reserved, HookType.AFTER)


def at_least_what_is_reserved(extra: int, *server_args: Any) -> int:
    """Columns behind the context, given SGLang's own count of them."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(extra, get_alloc_reserve_per_decode(*server_args))
