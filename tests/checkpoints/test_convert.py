"""Does a converted GGUF file load, with every weight where it belongs and a tokenizer that splits as it should?"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sgl_lim.checkpoints.catalogue import CheckpointError
from sgl_lim.checkpoints.convert import convert
from sgl_lim.checkpoints.families import FAMILIES, hugging_face_name
from support.tiny_gguf import write_gemma, write_llama

WRITERS = {"llama": write_llama, "gemma3": write_gemma}


def converted(tmp_path: Path, write: Callable[[Path], dict[str, torch.Tensor]]) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = write(tmp_path / "model.gguf")
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder, lambda line: None)
    return folder, weights


@pytest.mark.parametrize("family", WRITERS)
def test_every_weight_is_where_it_belongs(family: str, tmp_path: Path) -> None:
    folder, weights = converted(tmp_path, WRITERS[family])
    found = load_file(folder / "model.safetensors")
    expected = {hugging_face_name(name, FAMILIES[family]): value for name, value in weights.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name].float(), value), name


@pytest.mark.parametrize("family", WRITERS)
def test_transformers_misses_no_weight_and_knows_every_one(family: str, tmp_path: Path) -> None:
    folder, _ = converted(tmp_path, WRITERS[family])
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == model.config.eos_token_id
    assert torch.isfinite(model(torch.tensor([[1, 2, 4]])).logits).all()


def tokenizer(tmp_path: Path, family: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(converted(tmp_path, WRITERS[family])[0])


def test_digits_and_blanks_of_smollm_stand_alone(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, "llama")
    assert found.tokenize("ab ab  12\n<|im_end|>") == ["ab", "Ġab", "ĠĠ", "1", "2", "Ċ", "<|im_end|>"]
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert found.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"


def test_gemma_merges_by_score_and_begins_with_bos(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, "gemma3")
    # `▁a` and `bc` come before `ab`, which a split from the left would take.
    assert found.tokenize(" abc ab\n\n") == ["▁abc", "▁a", "b", "\n\n"]
    text = "abc 12 a  b\n\n ü"
    ids = found(text)["input_ids"]
    assert ids[0] == found.bos_token_id and found.decode(ids[1:]) == text


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf")
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="architecture is mamba; known are llama, gemma3"):
        convert(tmp_path / "model.gguf", tmp_path, lambda line: None)
