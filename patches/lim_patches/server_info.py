"""A block of the plugin's own in `/server_info`, and a call when the scheduler goes idle.

Symptom: nothing outside the scheduler process can see what a plugin's backend does.
Cause: `/server_info` is assembled from fixed fields, and SGLang's periodic metrics know only its own counters.
Versions: all supported.
Remove when: SGLang lets an attention backend contribute to its internal state and metrics.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
TARGETS = (f"{_SCHEDULER}.get_internal_state", f"{_SCHEDULER}.on_idle")


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register(*, key: str, describe: Callable[[], dict[str, Any] | None], on_idle: Callable[[], None]) -> None:
    """Register the hooks.

    Args:
        key: name of the block under `internal_states[i]`.
        describe: the block, builtins only, or None for no block.
        on_idle: called at the start of every idle pass of the scheduler, so it must be cheap.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def after_get_internal_state(result: Any, *args: object, **kwargs: object) -> None:
        block = describe()
        if block is not None:
            result.internal_state[key] = block

    def before_on_idle(*args: object, **kwargs: object) -> None:
        on_idle()

    HookRegistry.register(TARGETS[0], after_get_internal_state, HookType.AFTER)
    HookRegistry.register(TARGETS[1], before_on_idle, HookType.BEFORE)
