"""A Hugging Face checkpoint in decode: a dense prompt, then known tokens as decode steps under any method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_lim.evaluate.step_rows import INTERFACE, PromptPass, StepRows, UnsupportedModel, attention_interface, under_way
from sgl_lim.methods import Method


@dataclass(frozen=True)
class Prompt:
    """A prompt in the cache."""

    cache: Any  # transformers' DynamicCache, on the model's device
    length: int
    logits: Tensor  # float32 [keep, vocab]: of the tokens after its last ones


@dataclass(frozen=True)
class Decoded:
    """What the steps of one sequence found."""

    logits: Tensor  # float32 [S, vocab]: of the token after each one fed
    attended: Tensor  # float32 [S]: share of their context that sparse layers read, mean over them
    read: Tensor  # float32 [S]: tokens that a layer reads, mean over all layers


class Checkpoint:
    """A model and its tokenizer. The model's attention is `INTERFACE`, one sequence at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Of a causal language model of transformers.

        Raises:
            UnsupportedModel: its layers do not all keep every token's keys and values.
        """
        check_config(model.config)
        _register()
        model.set_attn_implementation(INTERFACE)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self._text = model.config.get_text_config()

    @property
    def depth(self) -> int:
        """Layers."""
        return self._text.num_hidden_layers

    @property
    def rounds(self) -> bool:
        """Whether the order of its sums alone changes tokens."""
        return self.model.dtype != torch.float32

    @property
    def longest(self) -> int:
        """Tokens that the model's positions allow."""
        return self._text.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without what the tokenizer puts around it."""
        # Not verbose: a text may be longer than the model's context before windows are cut from it.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def beginning(self) -> list[int]:
        """Token ids that the tokenizer puts before a text."""
        whole, bare = self.tokenizer("a").input_ids, self.encode("a")
        places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(places, 0)]

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, keep: int = 1) -> Prompt:
        """Dense causal pass over a prompt, with the logits of its last `keep` tokens.

        Raises:
            UnsupportedModel: the model's attention is not all by transformers' interface.
        """
        from transformers import DynamicCache

        dense, cache = PromptPass(), DynamicCache()
        with under_way(dense):
            logits = self._logits(tokens, cache, first=0, keep=keep)
        if dense.seen != set(range(self.depth)):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: {len(dense.seen)} of {self.depth} layers attend by transformers' "
                "attention interface; all have to"
            )
        return Prompt(cache, len(tokens), logits)

    @torch.inference_mode()
    def decode(self, prompt: Prompt, fed: Sequence[int], method: Method, *, rows: int) -> Decoded:
        """Feed tokens [S] behind a prompt under a method, `rows` steps at once; the prompt stays as it was."""
        parts = []
        try:
            for first in range(0, len(fed), rows):
                parts.append(self._decode_rows(prompt, prompt.length + first, fed[first : first + rows], method))
        finally:
            prompt.cache.crop(prompt.length)
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "attended", "read"))
        return Decoded(*joined)

    def _decode_rows(self, prompt: Prompt, before: int, fed: Sequence[int], method: Method) -> Decoded:
        steps = StepRows(
            method,
            before=before,
            rows=len(fed),
            heads=self._text.num_attention_heads,
            depth=self.depth,
            device=self.model.device,
        )
        with under_way(steps):
            logits = self._logits(fed, prompt.cache, first=before, keep=0)
        return Decoded(logits, steps.attended(), steps.read())

    def _logits(self, tokens: Sequence[int], cache: Any, *, first: int, keep: int) -> Tensor:
        """float32 logits [S, vocab] of the last `keep` tokens, or with 0 of all."""
        device = self.model.device
        ids = torch.tensor([list(tokens)], device=device)
        positions = torch.arange(first, first + len(tokens), device=device)[None]
        found = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        return found.logits[0].float()


def load_config(path: str) -> Any:
    """The checkpoint's configuration.

    Raises:
        UnsupportedModel: it cannot be read, or is one that `check_config` refuses.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"--model-path {path}: {error}") from error
    check_config(config)
    return config


def load(path: str, *, device: str, dtype: str) -> Checkpoint:
    """Model and tokenizer of a folder or a name on the hub.

    Args:
        dtype: as torch names it, or `auto` for the checkpoint's own.

    Raises:
        UnsupportedModel: the device is not there, transformers cannot load a causal language model, or `Checkpoint`
            refuses it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _register()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedModel(f"--device {device}: {error}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=INTERFACE)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"--model-path {path}: {error}") from error
    return Checkpoint(model.to(device), tokenizer)


def check_config(config: Any) -> None:
    """Refuse what SGLang's backend refuses too.

    Raises:
        UnsupportedModel: with every reason.
    """
    text, reasons = config.get_text_config(), []
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if others:
        reasons.append(f"it has layers of {', '.join(others)}, and only full_attention keeps every token")
    elif window is not None and not getattr(text, "layer_types", None):
        reasons.append(f"its sliding window of {window} tokens already drops tokens")
    if getattr(text, "kv_lora_rank", None):
        reasons.append("MLA keeps one latent per token and has no KV heads to gather")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder-decoder reads its prompt by cross-attention")
    if reasons:
        name = Path(getattr(config, "_name_or_path", "") or "").name or config.model_type
        raise UnsupportedModel(f"{name} ({config.model_type}) cannot be measured: {'; '.join(reasons)}")


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, attention_interface)
