"""A call for each request whose result of a decode step SGLang throws away.

Symptom: a request of one token runs a decode step that nobody asked for, and a backend that counts cannot tell.
Cause: the overlap scheduler launches the next decode step before it has looked at the results of the last one. A
    request that these finish (by a stop token or string, by an abort, up to 0.5.17 by its length too) is in that step
    already, and one that is retracted has the result before still coming. `process_batch_result_decode` skips both.
Versions: all supported. From 0.5.22 on a request that will finish by its length is left out of the step after.
Remove when: SGLang tells an attention backend which rows of a step were kept.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version

_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
TARGETS = (f"{_PROCESSOR}.process_batch_result_decode",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register(*, on_discarded: Callable[[Any, list[int]], None]) -> None:
    """Register the hook.

    Args:
        on_discarded: called with the batch's rows of the request pool, int64 [B] on the device, and the places in it
            whose results are thrown away; not called if there are none.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before_results(processor: Any, batch: Any, *args: object, **kwargs: object) -> None:
        # SGLang's own condition: the requests are as they will be when it looks at this step's results.
        places = [
            place
            for place, req in enumerate(batch.reqs)
            if processor.enable_overlap and (req.finished() or req.is_retracted)
        ]
        if places:
            on_discarded(batch.req_pool_indices, places)

    HookRegistry.register(TARGETS[0], before_results, HookType.BEFORE)
