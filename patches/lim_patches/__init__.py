"""Hooks into SGLang that its extension points do not cover, one file a seam.

Each seam module states symptom, cause, versions and when it can go, and has

    TARGETS              the dotted names it hooks,
    applies(version)     whether this SGLang release needs it,
    register(...)        which hands its hooks to SGLang's `HookRegistry`; idempotence is the registry's.

SGLang applies registered hooks after all plugins ran and only logs a target it cannot find, so `verify` is called
where failure can be loud: when the backend is built.
"""

from lim_patches.registry import installed_targets, sglang_version, use, verify

__all__ = ["installed_targets", "sglang_version", "use", "verify"]
