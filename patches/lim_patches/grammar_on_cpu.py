"""SGLang 0.5.17 masks logits by a grammar on accelerators alone.

Symptom: a request with `regex`, `json_schema` or `ebnf` ends a CPU server, by `Found no NVIDIA driver on your system`.
Cause: XGrammar's bit mask is allocated in pinned memory whatever the device, and applied by kernels for accelerators.
Versions: 0.5.17. 0.5.23 does both on a CPU too; releases between them were not looked at.
Remove when: 0.5.17 is no longer supported.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

_BACKEND = "sglang.srt.constrained.xgrammar_backend"
TARGETS = (f"{_BACKEND}._allocate_token_bitmask", f"{_BACKEND}.XGrammarGrammar.apply_vocab_mask")


def applies(version: Version) -> bool:
    """Whether `version` of SGLang needs this seam, on this machine."""
    return version < Version("0.5.18") and not torch.accelerator.is_available()


def register() -> None:
    """Register the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGETS[0], allocate, HookType.AROUND)
    HookRegistry.register(TARGETS[1], apply, HookType.AROUND)


def allocate(original: Callable[..., Tensor], vocab_size: int, batch_size: int) -> Tensor:
    """A mask that allows everything, int32 [batch_size, words of 32 tokens], in memory that is not pinned."""
    return torch.full((batch_size, -(-vocab_size // 32)), -1, dtype=torch.int32)


def apply(original: Callable[..., None], grammar: Any, logits: Tensor, vocab_mask: Tensor) -> None:
    """Set logits [B, V] of tokens whose bit is 0 to -inf, in place."""
    bits = vocab_mask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))
