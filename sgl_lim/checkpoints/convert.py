"""From a GGUF file to a folder that transformers and SGLang load, in bfloat16.

Done here and not by transformers, because its 5.19 refuses to save what it reads from these files, and because what it
makes of their tokenizers is wrong in 5.12.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgl_lim.checkpoints.catalogue import CheckpointError
from sgl_lim.checkpoints.download import Say
from sgl_lim.checkpoints.families import FAMILIES, Family, hugging_face_name, shared_config
from sgl_lim.checkpoints.gguf_file import GgufFile
from sgl_lim.checkpoints.tokenizer import build_tokenizer, tokenizer_config


def convert(path: Path, folder: Path, say: Say) -> None:
    """Write weights, configuration and tokenizer of the GGUF file at `path` into the empty `folder`.

    Raises:
        CheckpointError: the package gguf is missing, or the file's architecture or tokenizer is not known.
    """
    say("reading the file (up to half a minute)")
    gguf = GgufFile(path)
    architecture = gguf["general.architecture"]
    if architecture not in FAMILIES:
        raise CheckpointError(f"the file's architecture is {architecture}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    say(f"converting {gguf.num_tensors} weights")
    save_file(_weights(gguf, family), folder / "model.safetensors", metadata={"format": "pt"})
    say("building the tokenizer")
    build_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    ids = {f"{key}_token_id": gguf[f"tokenizer.ggml.{name}_token_id"] for key, name in _IDS.items()}
    _write(folder / "tokenizer_config.json", tokenizer_config(gguf))
    _write(folder / "config.json", {**shared_config(gguf), **family.config(gguf), **ids})
    _write(folder / "generation_config.json", ids)


_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _weights(gguf: GgufFile, family: Family) -> dict[str, torch.Tensor]:
    """All weights in bfloat16, by Hugging Face's names."""
    return {
        hugging_face_name(name, family): family.weight(name, value, gguf).to(torch.bfloat16).contiguous()
        for name, value in gguf.weights()
    }


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
