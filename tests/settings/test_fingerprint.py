"""Fingerprints: equal for one checkpoint wherever it lies, different for a fine-tune of the same shape."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_lim.settings import fingerprint as under_test
from sgl_lim.settings.fingerprint import NoCheckpoint, fingerprint


def weights(seed=0, rows=512):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(rows, 64, generator=generator) for i in range(4)}


def write(folder: Path, tensors=None, config='{"hidden_size": 64}') -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["whole", "sampled"])
def plain(request, tmp_path, monkeypatch) -> Path:
    """A checkpoint of half a megabyte, whose file is read whole or in few blocks."""
    if request.param == "sampled":
        monkeypatch.setattr(under_test, "_BLOCKS", 16)
    return write(tmp_path / "plain")


def test_a_copy_elsewhere_is_the_same(plain, tmp_path):
    copied = shutil.copytree(plain, tmp_path / "deep" / "copy")
    linked = tmp_path / "linked"
    linked.symlink_to(plain)
    found = fingerprint(str(plain))
    assert len(found) == 64 and fingerprint(str(copied)) == fingerprint(str(linked)) == found


def test_files_that_are_no_weights_do_not_count(plain):
    before = fingerprint(str(plain))
    for name in ("README.md", "tokenizer.json", "training_args.bin", "pytorch_model.bin"):
        (plain / name).write_bytes(b"more")
    assert fingerprint(str(plain)) == before


def test_a_fine_tune_of_the_same_shape_is_another(plain, tmp_path):
    tuned = {name: tensor + 1e-3 for name, tensor in weights().items()}
    other = write(tmp_path / "tuned", tuned)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain, other)]
    assert sizes[0] == sizes[1] and fingerprint(str(other)) != fingerprint(str(plain))


def test_one_tuned_layer_is_seen_in_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(under_test, "_BLOCKS", 16)
    for index in range(4):
        tuned = weights()
        tuned[f"layer.{index}"] += 1e-3
        assert fingerprint(str(write(tmp_path / f"tuned{index}", tuned))) != fingerprint(
            str(write(tmp_path / f"plain{index}"))
        )


def test_config_names_and_shapes_count(plain, tmp_path):
    renamed = {name.replace("layer", "block"): tensor for name, tensor in weights().items()}
    others = [
        write(tmp_path / "config", config='{"hidden_size": 65}'),
        write(tmp_path / "names", renamed),
        write(tmp_path / "shapes", {name: tensor.T.contiguous() for name, tensor in weights().items()}),
        write(tmp_path / "larger", weights(rows=513)),
    ]
    moved = write(tmp_path / "file")
    (moved / "model.safetensors").rename(moved / "model-00001-of-00001.safetensors")
    found = [fingerprint(str(folder)) for folder in (plain, *others, moved)]
    assert len(set(found)) == len(found)


def test_the_whole_header_counts(tmp_path, monkeypatch):
    """It is longer than a block, and what the names differ in lies between the blocks."""
    monkeypatch.setattr(under_test, "_BLOCKS", 16)
    tensors = {f"layer.{i:03}": torch.zeros(1024) for i in range(300)}
    last = tensors.pop("layer.299")
    found = {fingerprint(str(write(tmp_path / name, {**tensors, name: last}))) for name in ("layer.299", "layer.399")}
    assert len(found) == 2


def test_what_changes_in_place_changes_the_fingerprint(plain):
    before = fingerprint(str(plain))
    save_file(weights(seed=1), plain / "model.safetensors")
    assert fingerprint(str(plain)) != before


def test_pickled_weights_and_single_files_have_one(tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"weights" * 99)
    before = fingerprint(str(pickled))
    (pickled / "training_args.bin").write_bytes(b"no weights")
    assert fingerprint(str(pickled)) == before
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(99))
    found = [fingerprint(str(path)) for path in (pickled, gguf)]
    gguf.write_bytes(b"GGUF" + bytes(98) + b"\1")
    assert len({*found, fingerprint(str(gguf))}) == 3


def snapshot(cache: Path, commit: str, plain: Path) -> Path:
    """The checkpoint as the hub's cache has it: a snapshot folder of links to blobs, `main` pointing to it."""
    repository = cache / "models--some--model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for index, file in enumerate(plain.iterdir()):
        blob = repository / "blobs" / f"{commit}{index}"
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def test_a_name_on_the_hub_is_its_snapshot(plain, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tuned = write(tmp_path / "tuned", weights(seed=1))
    snapshot(tmp_path / "hub", "b" * 40, tuned)
    folder = snapshot(tmp_path / "hub", "a" * 40, plain)
    assert fingerprint("some/model") == fingerprint(str(folder)) == fingerprint(str(plain))
    assert fingerprint("some/model", "b" * 40) == fingerprint(str(tuned))
    with pytest.raises(NoCheckpoint, match="some/other: neither a folder"):
        fingerprint("some/other")


@pytest.mark.parametrize("path", ["/no/such/folder", "s3://bucket/model", "not a name", ""])
def test_what_is_not_there_has_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoCheckpoint):
        fingerprint(path)


def test_a_folder_without_weights_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NoCheckpoint, match=r"no weights; expected \*\.safetensors"):
        fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "not downloaded")
    with pytest.raises(OSError):
        fingerprint(str(tmp_path))
