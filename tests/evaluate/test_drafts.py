"""Do rounds over a known text accept everything on whole sets, and else go by the sets that were asked for?"""

import csv
from pathlib import Path

import pytest
import torch

from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.choices import FULL, Choice, method_of
from sgl_lim.evaluate.cli import main
from sgl_lim.evaluate.draft_report import measure_drafts, ways_of
from sgl_lim.evaluate.drafts import WAYS, KnownText, Rounds, Way, accepted, expected_run
from sgl_lim.evaluate.items import Item, ItemError, Suite
from sgl_lim.methods import Full
from support.tiny_transformers import DEPTH, tiny

LENGTH, START, DRAFTS = 150, 100, 3
FIRST, ACCEPTED = (Way(name, (name,)) for name in ("first", "accepted"))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(tiny("qwen3"), tokenizer=None)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(512, (2, LENGTH), generator=generator).tolist()


def known(checkpoint: Checkpoint, texts: list[list[int]]) -> list[KnownText]:
    found: list[KnownText] = []
    for text in texts:
        found.append(KnownText(checkpoint, text, START - DRAFTS - 1, found[0] if found else None))
    return found


def choice(budget: int, layers: tuple[int, ...] = (1,)) -> Choice:
    return Choice("lessismore", method_of("lessismore:aggregate=max", budget, layers))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_everything_is_accepted_of_drafts_that_read_everything(
    checkpoint: Checkpoint, texts: list[list[int]], way: Way
) -> None:
    rounds = Rounds(checkpoint, known(checkpoint, texts), choice(256).method, way, DRAFTS)
    found = accepted(rounds, [(START, LENGTH)] * 2, DRAFTS, lambda tokens: None)
    assert found.at == pytest.approx([1.0] * DRAFTS, abs=1e-3)
    assert found.run == pytest.approx([DRAFTS] * 2, abs=1e-2)
    assert found.rounds == 2 * ((LENGTH - START - DRAFTS - 1) // (DRAFTS + 1) + 1)


def test_the_first_draft_behind_the_token_that_chose_is_a_step_on_its_set(
    checkpoint: Checkpoint, texts: list[list[int]]
) -> None:
    """With all layers selecting, layer 0 chooses by the same query and keys as a step of its own would."""
    rounds = Rounds(checkpoint, known(checkpoint, texts), choice(32, (0,)).method, ACCEPTED, DRAFTS)
    chances = rounds.run([0, 1], [START + 4, START + 9], [START, START + 5])
    alone = rounds.run([1], [START + 9], [START + 5])
    torch.testing.assert_close(chances[1], alone[0], rtol=1e-4, atol=1e-4)
    assert ((chances > 0) & (chances < 0.999)).all()


def test_sets_of_another_query_accept_otherwise(checkpoint: Checkpoint, texts: list[list[int]]) -> None:
    given = known(checkpoint, texts)
    one, other = (Rounds(checkpoint, given, choice(32).method, way, DRAFTS) for way in (FIRST, ACCEPTED))
    place = ([0], [START + 4], [START])
    assert not torch.allclose(one.run(*place), other.run(*place), atol=1e-3)
    # Where one token was kept, it is the first and the last that was.
    place = ([0], [START + 1], [START])
    torch.testing.assert_close(one.run(*place), other.run(*place), rtol=1e-4, atol=1e-4)


def test_the_expected_run_is_that_of_all_outcomes() -> None:
    assert expected_run([0.5, 0.5]) == 0.75 and expected_run([1, 1, 1]) == 3 and expected_run([0, 1]) == 0


def test_ways_are_those_that_a_method_has_and_each_is_measured_once() -> None:
    window = Choice("window", method_of("window", 32, (1,)))
    quest = Choice("quest", method_of("quest", 32, (1,)))
    both = [choice(32, (1,)), choice(32, (1, 2))]
    assert [way.name for _, way in ways_of([FULL, window, quest])] == ["unguided"]
    every = sum(way.every_layer for way in WAYS)
    assert len(ways_of(both)) == 2 * len(WAYS) - every
    assert not ways_of([Choice("full", Full())])


def test_items_that_end_within_a_round_are_refused(checkpoint: Checkpoint, texts: list[list[int]]) -> None:
    suite = Suite("short", "text", (Item(texts[0][:START], texts[0][START : START + 2]),))
    with pytest.raises(ItemError, match="short: items end before a round of 3 drafts does; lower --drafts"):
        measure_drafts(checkpoint, suite, [choice(32)], DRAFTS, lambda tokens: None)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from support.tiny_model import write_tiny_model

    folder, output = (
        write_tiny_model(tmp_path / "tiny", layers=DEPTH, hidden=64, heads=4, head_dim=16),
        tmp_path / "a.csv",
    )
    command = ["--model-path", str(folder), "--measure", "drafts", "--drafts", "3", "--tasks", "chains"]
    command += ["--context", "300", "--items", "2", "--steps", "3", "--budgets", "32", "--selection", "1"]
    command += ["--methods", "lessismore,window"]
    assert main([*command, "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lessismore"] * len(WAYS) + ["window"]
    assert {row["selection_layers"] for row in rows} == {"1", "every"}
    assert all(0 < float(row["accepted"]) <= 3 and 0 < float(row["at_3"]) <= 1 for row in rows)
    assert all(float(row["accepted_low"]) <= float(row["accepted"]) <= float(row["accepted_high"]) for row in rows)
    assert "accepted of 3" in capsys.readouterr().out
    assert main([*command, "--methods", "full", "--output", str(output)]) == 2
    assert "no method of --methods can draft" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "needles"])
    assert "needles end before a round" in capsys.readouterr().err
