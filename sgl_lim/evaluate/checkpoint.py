"""A Hugging Face checkpoint in decode: a dense prompt, then known tokens as decode steps under any method."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lim_kernels.page_bounds import PAGE
from sgl_lim.evaluate.own_pages import OwnPages, own_pages, rotation_of
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.step_rows import (
    INTERFACE,
    Pass,
    PromptPass,
    Rows,
    StepRows,
    UnsupportedModel,
    attention_interface,
    under_way,
)
from sgl_lim.gates.weights import ModelShape
from sgl_lim.methods import Method

_WIDTHS = 64
"""Tables of slots are as wide as a multiple of this, so that kernels meet few widths."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in a pool."""

    tokens: tuple[int, ...]
    pool: Pool
    slots: Tensor  # int64 [length], on the model's device
    logits: Tensor  # float32 [keep, vocab]: of the tokens after its last ones

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class Decoded:
    """What the steps of one sequence found."""

    logits: Tensor  # float32 [S, vocab]: of the token after each one fed
    attended: Tensor  # float32 [S]: share of their context that sparse layers read, mean over them
    read: Tensor  # float32 [S]: tokens that a layer reads, mean over all layers


class Checkpoint:
    """A model and its tokenizer. The model's attention is `INTERFACE`."""

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
        self._own_pages: dict[Method, OwnPages | None] = {}

    @property
    def depth(self) -> int:
        """Layers."""
        return self._text.num_hidden_layers

    @property
    def heads(self) -> int:
        """Query heads."""
        return self._text.num_attention_heads

    @property
    def shape(self) -> ModelShape:
        """What gates have to fit."""
        head_dim = getattr(self._text, "head_dim", None) or self._text.hidden_size // self.heads
        kv_heads = getattr(self._text, "num_key_value_heads", None) or self.heads
        return ModelShape(self.depth, self.heads, kv_heads, head_dim)

    @property
    def rounds(self) -> bool:
        """Whether the order of its sums alone changes tokens."""
        return self.model.dtype != torch.float32

    @property
    def longest(self) -> int:
        """Tokens that the model's positions allow."""
        return self._text.max_position_embeddings

    def own_pages(self, method: Method) -> OwnPages | None:
        """What layers choose by that choose for themselves under a method; None where none does.

        Raises:
            ValueError: they choose by gates, and these are not the model's.
        """
        if method not in self._own_pages:
            turned = rotation_of(self.model)
            self._own_pages[method] = own_pages(method, self.shape, turned, self.model.dtype, self.model.device)
        return self._own_pages[method]

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
    def prefill(
        self,
        tokens: Sequence[int],
        *,
        keep: int = 1,
        beside: Prompt | None = None,
        room: int = 0,
        note: Callable[[int, Tensor, float], None] | None = None,
    ) -> Prompt:
        """Dense causal pass over a prompt, with the logits of its last `keep` tokens.

        Args:
            beside: a prompt whose pool this one joins, and whose slots it shares as far as both begin equally.
            room: slots that a new pool will have in the end, if that is known.
            note: is told each layer's queries [1, H, S, D] and their scale.

        Raises:
            UnsupportedModel: the model's attention is not all by transformers' interface.
        """
        pool = Pool(room=room) if beside is None else beside.pool
        shared = 0 if beside is None else shared_tokens(beside.tokens, tokens, len(tokens) - keep)
        slots = pool.take(len(tokens) - shared, self.model.device)
        if beside is not None:
            slots = torch.cat((beside.slots[:shared], slots))
        dense = PromptPass(pool, slots, note=note)
        ids = torch.tensor(tokens[shared:], device=self.model.device)
        positions = torch.arange(shared, len(tokens), device=self.model.device)
        with under_way(dense):
            logits = self._logits(ids, positions, keep=keep)
        if dense.seen != set(range(self.depth)):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: {len(dense.seen)} of {self.depth} layers attend by transformers' "
                "attention interface; all have to"
            )
        return Prompt(tuple(tokens), pool, slots, logits)

    def decode(self, prompt: Prompt, fed: Sequence[int], method: Method, *, rows: int) -> Decoded:
        """Feed tokens [S] behind a prompt under a method, `rows` steps at once; the prompt stays as it was."""
        used = prompt.pool.used
        parts = [self.step(prompt.pool, one, method) for one in self.rows_behind([(prompt, fed)], rows=rows)]
        prompt.pool.used = used
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "attended", "read"))
        return Decoded(*joined)

    def rows_behind(self, fed: Sequence[tuple[Prompt, Sequence[int]]], *, rows: int) -> list[Rows]:
        """Tokens behind prompts of one pool, in order, at most `rows` at once; they get slots of their own.

        Methods that choose pages find them whole behind the pool's last prompt alone.
        """
        device, slots = self.model.device, []
        ids: list[int] = []
        # Of each row its sequence and its length.
        places: list[tuple[int, int]] = []
        for prompt, tokens in fed:
            own = prompt.pool.take(len(tokens), device, go_on=int(prompt.slots[-1]) + 1 == prompt.pool.used)
            slots.append(torch.cat((prompt.slots, own)).int())
            ids += tokens
            places += [(len(slots) - 1, len(prompt) + n + 1) for n in range(len(tokens))]
        made = []
        for first in range(0, len(ids), rows):
            part = places[first : first + rows]
            lens = torch.tensor([length for _, length in part], dtype=torch.int32, device=device)
            width = max(length for _, length in part)
            table = torch.zeros(len(part), table_width(width), dtype=torch.int32, device=device)
            for row, (sequence, length) in enumerate(part):
                table[row, :length] = slots[sequence][:length]
            made.append(Rows(torch.tensor(ids[first : first + rows], device=device), table, lens))
        return made

    @torch.inference_mode()
    def step(self, pool: Pool, rows: Rows, method: Method) -> Decoded:
        """Rows of `rows_behind` under a method; those before them in their sequences ran already."""
        steps = StepRows(method, pool, rows, heads=self.heads, depth=self.depth, pages=self.own_pages(method))
        return Decoded(self.run(rows, steps), steps.attended(), steps.read())

    @torch.inference_mode()
    def run(self, rows: Rows, one: Pass) -> Tensor:
        """Logits float32 [R, vocab] of the tokens after the rows, with attention by a pass."""
        with under_way(one):
            return self._logits(rows.ids, (rows.lens - 1).long(), keep=0)

    def _logits(self, ids: Tensor, positions: Tensor, *, keep: int) -> Tensor:
        """float32 logits [S, vocab] of the last `keep` tokens, or with 0 of all."""
        found = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep)
        return found.logits[0].float()


def table_width(longest: int) -> int:
    """Columns of a table of slots for rows of so many tokens at most."""
    return -(-longest // _WIDTHS) * _WIDTHS


def shared_tokens(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Leading tokens that are equal, at most so many and in whole pages."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return min(sum(1 for _ in pairs), most) // PAGE * PAGE


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
    elif window is not None and window < text.max_position_embeddings and not getattr(text, "layer_types", None):
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
