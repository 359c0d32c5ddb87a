"""A grammar that llguidance finds to allow nothing ends the server where a speculative algorithm verifies.

Symptom: with `--grammar-backend llguidance` and a speculative algorithm, a request whose `regex` allows nothing, as
    `[^\\s\\S]` does, ends the server, by `ValueError: NoExtensionBias`.
Cause: where nothing can follow, llguidance lets an answer end there: its mask has the token that ends one, and its
    matcher stops. SGLang takes that for a failure where it fills one mask after another. Ordinary decoding fills all
    masks at once and does not look.
Versions: all supported.
Remove when: SGLang's `traverse_tree` outlives a grammar's error.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from packaging.version import Version
from torch import Tensor

_GRAMMAR = "sglang.srt.constrained.llguidance_backend.GuidanceGrammar"
TARGETS = (f"{_GRAMMAR}.fill_vocab_mask", f"{_GRAMMAR}.rollback")
_DEAD_END = "NoExtensionBias"


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, where it can run llguidance at all."""
    return find_spec("llguidance") is not None


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], fill, HookType.AROUND)
    HookRegistry.register(TARGETS[1], roll_back, HookType.AROUND)


def fill(original: Callable[..., None], grammar: Any, vocab_mask: Tensor, idx: int) -> None:
    """Fill a grammar's mask; at a dead end it has the tokens that end an answer."""
    _outlive_dead_ends(grammar, original, grammar, vocab_mask, idx)


def roll_back(original: Callable[..., None], grammar: Any, num_tokens: int) -> None:
    """Take tokens back. From a dead end nothing is taken back but the end, which llguidance was not told of."""
    _outlive_dead_ends(grammar, original, grammar, num_tokens)


def _outlive_dead_ends(grammar: Any, call: Callable[..., None], *args: Any) -> None:
    try:
        call(*args)
    except ValueError:
        if _DEAD_END not in grammar.ll_matcher.get_error():
            raise
