"""Do figures mean what they say, and does the last sentence follow its rule?"""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_lim.evaluate.checkpoint import Decoded, Prompt
from sgl_lim.evaluate.choices import FULL, ROUNDING, Choice, choices_of, method_of
from sgl_lim.evaluate.items import Item, Suite
from sgl_lim.evaluate.measure import Row, Share, measure, overlap
from sgl_lim.evaluate.plot import draw
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.report import FIELDS, WHERE, csv_file, csv_row, table, verdict

VOCABULARY = 4
SPARSE = Choice("window", method_of("window", 64, (2,)))


class Scripted:
    """A checkpoint that predicts token (last + 1) mod 4 under full attention; sparse, 0 at every odd step."""

    rounds = False

    def prefill(self, tokens: list[int]) -> Prompt:
        return Prompt(tuple(tokens), Pool(), torch.arange(len(tokens)), logits=self._logits([tokens[-1]]))

    def decode(self, prompt: Prompt, fed: list[int], method: Any, *, rows: int) -> Decoded:
        logits = self._logits(fed)
        sparse = method != FULL.method
        if sparse:
            logits[1::2] = self._logits([3])
        share = torch.full((len(fed),), 0.5 if sparse else 1.0)
        return Decoded(logits, share, share * len(prompt))

    @staticmethod
    def _logits(tokens: list[int]) -> torch.Tensor:
        return torch.log(torch.nn.functional.one_hot((torch.tensor(tokens) + 1) % 4, 4) * 0.6 + 0.1)


def test_rows_of_a_scripted_model() -> None:
    items = tuple(Item([0] * 100 + [i], [1, 2, 3, 0, 1], scored_from=1, depth=depth) for i, depth in ((0, 10), (3, 90)))
    told: list[int] = []
    full, sparse = measure(Scripted(), Suite("s", "text", items), [SPARSE], rows=2, done=told.append)
    assert told == [4] * 4 and (full.items, full.tokens) == (2, 8)
    assert (full.agreement.value, full.whole.value, full.right) == (1.0, 1.0, 1.0)
    # Steps 2 and 4 of four predict 0: the first wrongly, as 3 is right, and the other too.
    assert (sparse.agreement.value, sparse.whole.value, sparse.right) == (0.5, 0.0, 0.5)
    assert sparse.by_depth == {10: 0.0, 90: 0.0} and full.by_depth == {10: 1.0, 90: 1.0}
    assert full.perplexity == pytest.approx(1 / 0.7, rel=1e-5)
    assert sparse.perplexity == pytest.approx(math.exp(-(math.log(0.7) + math.log(0.1)) / 2), rel=1e-5)
    assert full.overlap == pytest.approx(1.0) and sparse.overlap == pytest.approx((1 + 0.4) / 2)
    assert sparse.agreement.low < 0.5 < sparse.agreement.high
    assert sparse.attended == 0.5 and sparse.attended_fraction == pytest.approx(50.5 / 103.5)


def test_overlap_is_the_probability_that_a_draft_is_accepted() -> None:
    one, other = torch.tensor([[0.5, 0.3, 0.2]] * 130).log(), torch.tensor([[0.1, 0.3, 0.6]] * 130).log()
    torch.testing.assert_close(overlap(one, other), torch.full((130,), 0.6))


def row(choice: Choice, suite: str, value: float, read: float) -> Row:
    share, task = Share(value, value, value), "text" if suite == "english" else "needles"
    whole = Share(0.0, 0.0, 0.0) if task == "text" else share
    figures = {"perplexity": 6.5, "overlap": value, "right": value, "attended": read, "seconds": 1.0}
    return Row(
        suite=suite,
        task=task,
        choice=choice,
        items=20,
        tokens=400,
        agreement=share if task == "text" else Share(0.0, 0.0, 0.0),
        whole=whole,
        by_depth={} if task == "text" else {10: value},
        attended_tokens=100.0,
        attended_fraction=read,
        **figures,
    )


def rows_of(**figures: tuple[float, float, float]) -> list[Row]:
    """Agreement, needles and share read of choices by their selection layers (`l2_8`); full attention first."""
    found = [row(FULL, "english", 1.0, 1.0), row(FULL, "needle", 1.0, 1.0)]
    for name, (agreement, needles, read) in figures.items():
        layers = tuple(map(int, name[1:].split("_")))
        choice = Choice("lessismore", method_of("lessismore", 64, layers))
        found += [row(choice, "english", agreement, read), row(choice, "needle", needles, read)]
    return found


def test_the_choice_keeps_needles_then_agrees_then_reads_least() -> None:
    rows = rows_of(l2_10=(0.97, 0.5, 0.2), l6_14=(0.940, 1.0, 0.3), l6_18=(0.945, 0.98, 0.4), l2_14=(0.92, 1.0, 0.2))
    assert "--lim-selection-layers 6,14:" in verdict(rows, 3.0)
    assert verdict(rows, 60.0).startswith("Set --lim-method lessismore --lim-budget 64 --lim-selection-layers 2,10:")
    assert "loses at most 0 points of needle (20)." in verdict(rows, 3.0) and "94.0% of tokens" in verdict(rows, 3.0)


def test_nothing_is_recommended_where_needles_are_lost() -> None:
    said = verdict(rows_of(l2_10=(0.97, 0.5, 0.2), l2_8=(0.9, 0.8, 0.2)), 3.0)
    assert said.startswith("Nothing tried is within 3 points, or one item, of full attention: ")
    assert "the nearest, lessismore 2,8 K=64, loses 20 points" in said
    assert verdict(rows_of(), 3.0).startswith("Only full attention")


def test_one_item_is_forgiven_but_not_two() -> None:
    assert "--lim-selection-layers 6,14:" in verdict(rows_of(l6_14=(0.9, 0.95, 0.3)), 3.0)
    assert verdict(rows_of(l6_14=(0.9, 0.90, 0.3)), 3.0).startswith("Nothing tried")
    assert "--lim-selection-layers 6,14:" in verdict(rows_of(l6_14=(0.9, 0.90, 0.3)), 10.0)


def test_full_attention_rounded_otherwise_is_no_choice() -> None:
    rows = [*rows_of(l2_10=(0.9, 1.0, 0.2)), row(ROUNDING, "english", 0.97, 1.0), row(ROUNDING, "needle", 1.0, 1.0)]
    assert "--lim-selection-layers 2,10:" in verdict(rows, 3.0) and "full in one pass" in table(rows)


def test_needles_that_full_attention_loses_tell_nothing() -> None:
    rows = rows_of(l2_10=(0.9, 0.1, 0.2))
    rows[1] = row(FULL, "needle", 0.4, 1.0)
    assert "tried on no needles or chains that full attention can do" in verdict(rows, 3.0)


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    rows, path = rows_of(l6_14=(0.94, 0.9, 0.3)), tmp_path / "out.csv"
    file = csv_file(path, {"model": "m", "seed": "0"})
    for count, one in enumerate(rows, start=1):
        file.add([csv_row(one)])
        with path.open() as read:
            found = list(csv.DictReader(read))
        assert len(found) == count and list(found[0]) == [*FIELDS, *WHERE]
    last = found[-1]
    assert (last["method"], last["budget"], last["selection_layers"]) == ("lessismore", "64", "6-14")
    assert (last["whole"], last["whole_at_10"], last["whole_at_30"], last["model"]) == ("0.9000", "0.9000", "", "m")
    assert found[0]["budget"] == "" and found[0]["selection_layers"] == ""
    assert (found[0]["selection_attends"], last["selection_attends"]) == ("", "context")


def test_the_table_has_a_line_a_choice() -> None:
    lines = table(rows_of(l6_14=(0.94, 0.9, 0.3))).splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["method", "layers", "budget", "read"],
        ["full", "-", "-", "100%"],
        ["lessismore", "6,14", "64", "30%"],
    ]
    assert "94.0% [94, 94] ppl 6.50" in lines[2] and lines[2].endswith("90% [90, 90]")


def test_the_plot_has_a_panel_a_suite(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    assert draw(rows_of(l6_14=(0.94, 0.9, 0.3)), path, "title") == [path]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_choices_are_every_method_budget_and_choice_of_layers_once() -> None:
    found = choices_of(["lessismore:aggregate=max", "quest", "full"], [32, 64], [(2,), (1, 3)], depth=4)
    assert [(c.spec, c.budget, c.layers) for c in found] == [
        ("full", None, ()),
        *(("lessismore:aggregate=max", budget, layers) for layers in ((2,), (1, 3)) for budget in (32, 64)),
        *(("quest", budget, ()) for budget in (32, 64)),
    ]
    assert found[1].flags() == "--lim-method lessismore --lim-budget 32 --lim-aggregate max --lim-selection-layers 2"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("dense", "--lim-method must be one of"),
        ("lessismore:heads=2", "no parameter 'heads'; there are aggregate"),
        ("lessismore:recency=many", "expected a share or auto, got 'many'"),
        ("lessismore:budget=64", "give budget with --budgets"),
        ("lessismore:top_p=0.9", "--lim-aggregate union ranks by place"),
        ("lessismore:selection_interval=4", "measure this on a server"),
        ("lessismore:prefix_selection=group:aggregate=max", "measure this on a server"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choices_of([spec], [64], [(2,)], depth=4)


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--selection 2,4: the model has the layers 0 to 3"):
        choices_of(["lessismore"], [64], [(2, 4)], depth=4)
