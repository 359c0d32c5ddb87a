"""Which hooks this process asked for, and whether SGLang applied them."""

from importlib.metadata import version
from types import ModuleType

from packaging.version import Version

_requested: list[str] = []


def sglang_version() -> Version:
    """Version of the installed SGLang distribution."""
    return Version(version("sglang"))


def use(seam: ModuleType, **callbacks: object) -> None:
    """Register a seam's hooks if this SGLang release needs them.

    Args:
        seam: a module of this package.
        callbacks: passed to the seam's `register`.
    """
    if not seam.applies(sglang_version()):
        return
    seam.register(**callbacks)
    _requested.extend(target for target in seam.TARGETS if target not in _requested)


def installed_targets() -> tuple[str, ...]:
    """Dotted names of the hooks that `use` registered in this process."""
    return tuple(_requested)


def verify() -> None:
    """Check that SGLang applied every registered hook.

    Raises:
        RuntimeError: naming each hook that is missing, and the versions the hooks were written for.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _requested if target not in HookRegistry._patched]
    if missing:
        raise RuntimeError(
            f"sgl-lim: SGLang {sglang_version()} did not apply the hooks on {', '.join(missing)}. "
            "They were verified on SGLang 0.5.17 and 0.5.23; the log lines 'Failed to apply hooks to' above say why. "
            "Install one of those releases, or open an issue with these lines."
        )
