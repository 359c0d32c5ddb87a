"""A call with the request rows of each batch, on the host, before it runs.

Symptom: an attention backend that has to do something for a request's first decode step would wait for the device to
    learn whether the request is in the batch.
Cause: `ForwardBatch` carries rows on the device alone (0.5.17), or not into the view by which graphs are replayed
    (0.5.23). `ScheduleBatch` has them on the host.
Versions: all supported.
Remove when: the view by which graphs are replayed carries them.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version

TARGETS = ("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register(*, on_batch: Callable[[Any, Any], None]) -> None:
    """Register the hook.

    Args:
        on_batch: called with SGLang's request pool and the batch's rows in it, int64 [B] on the host.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def after(forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: object, **kwargs: object) -> None:
        on_batch(model_runner.req_to_token_pool, batch.req_pool_indices_cpu)

    HookRegistry.register(TARGETS[0], after, HookType.AFTER)
