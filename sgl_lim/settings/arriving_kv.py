"""Whether KV can arrive on a server that did not compute it."""

from typing import Any

LOADERS = (
    *("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "radix_cache_backend"),
    "enable_unified_cache_external_linker",
)
"""Server arguments of SGLang by which KV of a prefix is loaded instead of computed."""


def brings_kv(server_args: Any) -> bool:
    """Whether SGLang's server arguments let KV arrive without a prefill on this server."""
    loads = any(getattr(server_args, name, None) for name in LOADERS)
    return loads or getattr(server_args, "disaggregation_mode", "null") == "decode"
