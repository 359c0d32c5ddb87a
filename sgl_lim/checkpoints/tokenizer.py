"""Tokenizers from the pieces of a GGUF file.

What transformers 5 builds of these files is wrong: Gemma's splits text into characters, and SmolLM2's has the beginning
of a turn for its end and does not part digits from blanks.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sgl_lim.checkpoints.catalogue import CheckpointError
from sgl_lim.checkpoints.gguf_file import GgufFile

# Types of pieces in GGUF files. Those that a user defined are matched before anything else, as the special ones are.
_NORMAL, _SPECIAL, _USER_DEFINED = 1, 3, 4


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The tokenizer. Raises `CheckpointError` for a kind that is not known."""
    kind = gguf["tokenizer.ggml.model"], gguf["tokenizer.ggml.pre"]
    if kind == ("gpt2", "smollm"):
        tokenizer = _byte_level(gguf)
    elif kind == ("llama", "default"):
        tokenizer = _sentence_piece(gguf)
    else:
        raise CheckpointError(f"the file's tokenizer is {kind}; known are ('gpt2', 'smollm') and ('llama', 'default')")
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in _pieces(gguf, _SPECIAL)])
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in _pieces(gguf, _USER_DEFINED)])
    return tokenizer


def tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    tokens = gguf["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.of_model("context_length"),
        "clean_up_tokenization_spaces": False,
        **{name: tokens[gguf[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
    }
    if "tokenizer.chat_template" in gguf:
        config["chat_template"] = gguf["tokenizer.chat_template"]
    return config


def _byte_level(gguf: GgufFile) -> Tokenizer:
    """GPT-2's kind: merges of bytes, from the file; every digit stands alone."""
    merges = [tuple(merge.split(" ")) for merge in gguf["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=_vocabulary(gguf), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(gguf: GgufFile) -> Tokenizer:
    """SentencePiece's BPE: blanks are written `▁`, unknown characters as bytes, and the first token is fixed."""
    tokens, unknown = gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.unknown_token_id"]
    model = BPE(
        vocab=_vocabulary(gguf), merges=_merges(gguf), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if gguf["tokenizer.ggml.add_bos_token"]:
        first = gguf["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A",
            pair=f"{tokens[first]} $A {tokens[first]}:1 $B:1",
            special_tokens=[(tokens[first], first)],
        )
    return tokenizer


def _merges(gguf: GgufFile) -> list[tuple[str, str]]:
    """All ways to make a normal piece of two others; pieces with a high score first, as SentencePiece merges them."""
    scores = dict(zip(gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.scores"], strict=True))
    normal = set(_pieces(gguf, _NORMAL))
    return [
        (piece[:at], piece[at:])
        for piece in sorted(normal, key=lambda piece: -scores[piece])
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]


def _vocabulary(gguf: GgufFile) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(gguf["tokenizer.ggml.tokens"])}


def _pieces(gguf: GgufFile, kind: int) -> list[str]:
    """The pieces of one type, in the order of their ids."""
    pairs = zip(gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.token_type"], strict=True)
    return [piece for piece, found in pairs if found == kind]
