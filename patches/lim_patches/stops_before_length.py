"""A stop in the run of tokens that reaches `max_new_tokens` is not seen.

Symptom: a speculative algorithm answers beyond a stop token or stop string, up to `max_new_tokens`, where ordinary
    decoding ends at the stop.
Cause: `Req.update_finish_state` looks at the length first, which is right where a step answers one token. A run of
    several can hold a stop before the token that reaches the length.
Versions: below 0.5.22; later releases look for stops first.
Remove when: 0.5.17 is no longer supported.
"""

import sys
from collections.abc import Callable
from typing import Any

from packaging.version import Version

TARGETS = ("sglang.srt.managers.schedule_batch.Req.update_finish_state",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return version < Version("0.5.22")


def register() -> None:
    """Register the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], look_for_stops_first, HookType.AROUND)


def look_for_stops_first(original: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """End a request at whichever comes first in its run, a stop or its length."""
    params = req.sampling_params
    most = params.max_new_tokens
    if new_accepted_len <= 1 or req.finished() or req.to_finish or len(req.output_ids) < most:
        original(req, new_accepted_len)
        return
    params.max_new_tokens = sys.maxsize
    try:
        original(req, new_accepted_len)
    finally:
        params.max_new_tokens = most
    ends = len(req.output_ids) if req.finished_len is None else req.finished_len
    # At the last token that counts, ordinary decoding names the length too.
    if not req.finished() or ends >= most:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        req.finished_reason, req.finished_len = FINISH_LENGTH(length=most), most
