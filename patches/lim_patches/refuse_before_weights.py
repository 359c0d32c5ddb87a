"""A look at model and server configuration before weights are loaded.

Symptom: a configuration that cannot work is refused only after minutes of weight loading.
Cause: SGLang builds attention backends after loading weights and sizing the KV pool, and has no plugin hook earlier
    that knows the model's configuration.
Versions: all supported.
Remove when: an attention backend can register a check of its own.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version

TARGETS = ("sglang.srt.model_executor.model_runner.ModelRunner.load_model",)


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register(*, check: Callable[[Any], None]) -> None:
    """Register the hook; `check(model_runner)` raises to refuse."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before_load_model(model_runner: Any, *args: object, **kwargs: object) -> None:
        check(model_runner)

    HookRegistry.register(TARGETS[0], before_load_model, HookType.BEFORE)
