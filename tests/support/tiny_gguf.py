"""Tiny GGUF files of both families, and the weights that Hugging Face's code has to get from them."""

from pathlib import Path

import gguf
import torch

HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP, LAYERS = 4, 2, 8, 32, 24, 6
BYTE_PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc12ĠĊ", "ab", "Ġab", "ĠĠ", "12"]
BYTE_MERGES = ["a b", "Ġ ab", "Ġ Ġ", "1 2"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
SENTENCE_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", *BYTES, "▁a", "bc", "▁abc", "ab", *"▁abc12"]


def write_llama(path: Path) -> dict[str, torch.Tensor]:
    """Write a Llama; returns Hugging Face's weights, all of which bfloat16 can hold."""
    weights = _weights("llama")
    file = _header(path, "llama")
    _tokenizer(file, "gpt2", "smollm", BYTE_PIECES, special=3, bos=1, eos=2, unknown=0, padding=2)
    file.add_token_merges(BYTE_MERGES)
    file.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, value in weights.items():
        if "attn_q" in name or "attn_k" in name:  # as llama.cpp lays rotary pairs side by side
            heads = HEADS if "attn_q" in name else KV_HEADS
            value = value.reshape(heads, 2, -1, WIDTH).transpose(1, 2).reshape(value.shape)
        file.add_tensor(name, value.numpy())
    _close(file)
    return weights


def write_gemma(path: Path) -> dict[str, torch.Tensor]:
    """Write a Gemma 3; returns Hugging Face's weights."""
    weights = _weights("gemma3")
    file = _header(path, "gemma3")
    file.add_key_length(HEAD_DIM)
    file.add_sliding_window(16)
    _tokenizer(file, "llama", "default", SENTENCE_PIECES, special=4, bos=2, eos=1, unknown=3, padding=0)
    file.add_add_bos_token(True)
    for name, value in weights.items():
        file.add_tensor(name, (value + 1 if "norm" in name else value).numpy())
    _close(file)
    return weights


def _header(path: Path, architecture: str) -> gguf.GGUFWriter:
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(LAYERS)
    file.add_context_length(128)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(MLP)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    return file


def _tokenizer(file: gguf.GGUFWriter, model: str, kind: str, pieces: list[str], *, special: int, **ids: int) -> None:
    types = [3 if number < special else 4 if "\n" in piece else 1 for number, piece in enumerate(pieces)]
    types = [6 if piece in BYTES else found for piece, found in zip(pieces, types, strict=True)]
    file.add_tokenizer_model(model)
    file.add_tokenizer_pre(kind)
    file.add_token_list(pieces)
    file.add_token_types(types)
    # The later a piece, the lower its score, as in a real file.
    file.add_token_scores([float(-number) for number in range(len(pieces))])
    file.add_bos_token_id(ids["bos"])
    file.add_eos_token_id(ids["eos"])
    file.add_unk_token_id(ids["unknown"])
    file.add_pad_token_id(ids["padding"])


def _weights(architecture: str) -> dict[str, torch.Tensor]:
    """Random weights by the file's names: multiples of 1/64 up to 1, so that neither bfloat16 nor `+ 1` rounds them."""
    vocabulary = len(BYTE_PIECES if architecture == "llama" else SENTENCE_PIECES)
    norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
    if architecture == "gemma3":
        norms |= {
            "attn_q_norm": HEAD_DIM,
            "attn_k_norm": HEAD_DIM,
            "post_attention_norm": WIDTH,
            "post_ffw_norm": WIDTH,
        }
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (q, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, q),
        "ffn_gate": (MLP, WIDTH),
        "ffn_up": (MLP, WIDTH),
        "ffn_down": (WIDTH, MLP),
        **{name: (size,) for name, size in norms.items()},
    }
    every = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    every |= {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(-64, 65, shape, generator=generator) / 64 for name, shape in every.items()}


def _close(file: gguf.GGUFWriter) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
