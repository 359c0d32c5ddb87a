"""Plugin flags on SGLang's command line.

Symptom: `--lim-budget` is an unknown argument, also as a key of `--config` YAML.
Cause: SGLang builds its parser from the fields of `ServerArgs` and has no extension point for a plugin's own flags;
    `from_cli_args` then keeps only those fields, so a plugin's values would be dropped silently.
Versions: all supported.
Remove when: SGLang lets general plugins add argument groups.
"""

import argparse
from collections.abc import Callable
from typing import Any

from packaging.version import Version

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
TARGETS = (f"{_SERVER_ARGS}.add_cli_args", f"{_SERVER_ARGS}.from_cli_args")


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam."""
    return True


def register(
    *, add_flags: Callable[[argparse.ArgumentParser], None], take_flags: Callable[[argparse.Namespace], None]
) -> None:
    """Register the hooks.

    Args:
        add_flags: adds the plugin's argument group to SGLang's parser.
        take_flags: is shown the parsed namespace before SGLang drops what it does not know.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def after_add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
        add_flags(parser)

    def around_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
        take_flags(args)
        return original(cls, args)

    HookRegistry.register(TARGETS[0], after_add_cli_args, HookType.AFTER)
    HookRegistry.register(TARGETS[1], around_from_cli_args, HookType.AROUND)
