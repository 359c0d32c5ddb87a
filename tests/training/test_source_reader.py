"""Does a short run learn, go on where it was, and publish an ordinary Qwen3?"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from small_qwen3.export import SpecialIds, export_model, model_config
from small_qwen3.model import SmallQwen3, load_checkpoint
from source_reader import train
from source_reader.export import export
from source_reader.masks import FIRST_CLOSABLE, SINKS, ClosedMask, draw_open_layers
from source_reader.model import PUBLISHED, TINY, count_parameters
from source_reader.muon import Muon, orthogonalise
from source_reader.schedule import Clock, Schedule
from source_reader.tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.package_tree import build_packages

STEPS = 60
COMMITTED = Path(__file__).parents[2] / "models" / "source-reader"


def tiny_model(seed: int = 0) -> SmallQwen3:
    torch.manual_seed(seed)
    model = SmallQwen3(TINY, dtype=torch.float32)
    model.initialise()
    return model


def test_the_committed_model_has_the_published_shape() -> None:
    config = json.loads((COMMITTED / "config.json").read_text())
    tokens = SpecialIds(config["bos_token_id"], config["eos_token_id"], config["pad_token_id"])
    assert config == model_config(PUBLISHED, tokens, config["max_position_embeddings"])
    index = json.loads((COMMITTED / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * count_parameters(PUBLISHED), "bytes of bfloat16 weights"


def test_export_is_transformers_qwen3_in_shards(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    export(model, tmp_path / "one")
    sizes = {"tokens": SpecialIds(1, 2, 0), "special": {}, "max_positions": 512}
    export_model(model, tmp_path / "three", load_tokenizer(), **sizes, parts=3)
    tokens = torch.randint(3, 8192, (2, 200))
    for folder in (tmp_path / "one", tmp_path / "three"):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    again = SmallQwen3(TINY)
    load_checkpoint(again, tmp_path / "three")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert len(list((tmp_path / "three").glob("model-*.safetensors"))) == 3


def test_the_exported_tokenizer_is_ours(tmp_path: Path) -> None:
    export(tiny_model(), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def trace(chain):\n    return v17 -> v203 + 4 ;\n"
    assert theirs.encode(text) == load_tokenizer().encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


def test_closed_rows_see_sinks_window_and_kept_tokens() -> None:
    closed = ClosedMask(200, torch.device("cpu"))
    closed.set(window=20, closed_from=90, kept=torch.tensor([33, 120]))
    assert isinstance(closed.mask, torch.Tensor)
    for q in range(200):
        for k in range(200):
            near = k > q - 20 or k < SINKS or k in (33, 120)
            assert closed.mask[q, k] == (k <= q and (q < 90 or near))


def test_drawing_keeps_the_buffers_that_compiled_layers_read() -> None:
    closed = ClosedMask(256, torch.device("cpu"))
    rng = random.Random(0)
    closed.draw(rng)
    first, rule = closed.mask, closed._rule
    closed.draw(rng)
    assert closed._rule is rule and not torch.equal(first, closed.mask)
    assert closed.mask.diagonal().all() and not closed.mask.triu(1).any()


def test_layers_open_alone_and_dense_layers_close_too() -> None:
    rng = random.Random(0)
    drawn = [draw_open_layers(rng, 12) for _ in range(600)]
    some = [d for d in drawn if len(d) < 12]
    assert 0.5 < len(some) / len(drawn) < 0.7
    assert {min(len(d - set(range(FIRST_CLOSABLE))) for d in some)} == {1}
    assert set().union(*some) == set(range(12)) and any(not d & {0, 1} for d in some)


@pytest.mark.parametrize("shape", [(3, 40, 16), (2, 16, 40), (1, 24, 24)], ids=str)
def test_orthogonalise_keeps_directions(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    ours = orthogonalise(matrices).float()
    assert ours.shape == matrices.shape
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.3 and values.max() < 1.4
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    exact = u @ vt
    cosine = (ours * exact).sum(dim=(1, 2)) / ours.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert cosine.min() > 0.95


def test_muon_is_pytorchs() -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(24, 16), torch.randn(8, 32)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    muon = Muon(ours, lr=0.02, decay=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.02, momentum=0.95, adjust_lr_fn="original")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step(1.0)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # Newton-Schulz runs in bfloat16 on both sides, in another order of additions.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_the_schedule_follows_the_clock() -> None:
    schedule = Schedule(2048, 8192, long_from=0.45, closing_from=0.6)
    assert [schedule.length(d) for d in (0.0, 0.44, 0.45, 1.0)] == [2048, 2048, 8192, 8192]
    assert [schedule.closes(d) for d in (0.3, 0.59, 0.6)] == [False, False, True]
    assert not Schedule(1, 2, long_from=0.5, closing_from=0.1).closes(0.4)
    assert not Schedule(1, 2, closing=False).closes(0.9)
    factors = [schedule.factor(d / 100) for d in range(101)]
    assert factors[0] < 0.1 and factors[20] == 1.0 and factors[100] == 0.02
    assert factors[40:] == sorted(factors[40:], reverse=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return build_packages(tmp_path_factory.mktemp("packages"))


class StepClock(Clock):
    """Every look at it is a second later, so that a run takes the same steps on any machine."""

    def __init__(self, budget: float, used: float = 0.0) -> None:
        self.budget, self.looks = STEPS, used

    @property
    def used(self) -> float:
        return self.looks

    @property
    def done(self) -> float:
        self.looks += 1
        return self.looks / self.budget


def command(folder: Path, packages: Path, work: str, *more: str) -> list[str]:
    places = ["--data", str(folder / "data"), "--work", str(folder / work), "--out", str(folder / work / "model")]
    sizes = [
        "--tiny",
        "--batch-tokens",
        "1024",
        "--chain-share",
        "0.5",
        "--chain-tokens",
        "6000",
        "--processes",
        "1",
        "--device",
        "cpu",
    ]
    return [*places, *sizes, "--packages", str(packages), "--minutes", "9", *more]


def test_a_short_run_learns_publishes_and_branches(tmp_path: Path, packages: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 0.0)
    monkeypatch.setattr(train, "Clock", StepClock)
    train.main(command(tmp_path, packages, "closed", "--closing-from", "0.5"))
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"open: text ([\d.]+)", out)]
    assert losses[0] > 8 and losses[-1] < 0.7 * losses[0]
    assert "closed: text" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "closed" / "model").config.num_hidden_layers == TINY.layers
    index = json.loads((tmp_path / "data" / "data.json").read_text())
    assert set(index["train"]["packages"]) == {"alpha", "beta"}

    branch = tmp_path / "closed" / "branch.pt"
    train.main(command(tmp_path, packages, "plain", "--no-closing", "--start-from", str(branch)))
    out = capsys.readouterr().out
    before = torch.load(branch, weights_only=False)
    first = re.search(r"% step (\d+) ", out)
    assert first and int(first[1]) == before["steps"] + 1
    assert "closed: text" not in out

    # The same command again goes on with the last state, whose time is over.
    train.main(command(tmp_path, packages, "closed"))
    assert "% step" not in capsys.readouterr().out


def test_a_run_without_time_to_train_says_so(tmp_path: Path, packages: Path) -> None:
    with pytest.raises(SystemExit, match="leave nothing for training"):
        train.main(command(tmp_path, packages, "closed", "--minutes", "1e-6"))
