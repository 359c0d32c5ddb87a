"""Does the benchmark of remembered sets compare what it says, and count as a server does?"""

import csv
import sys

import pytest

pytest.importorskip("safetensors")

from benchmarks import warm_start

FACTS, CHAINS, STEPS, BUDGET = 60, 2, 3, 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("warm") / "rows.csv"
    sizes = {"facts": FACTS, "chains": CHAINS, "steps": STEPS, "chain-budget": BUDGET, "contexts": 2, "decoded": 2}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    flags += ["--budgets", str(BUDGET), "--intervals", "1", "1+on", "1+random", "4", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["warm_start.py", *flags])
        warm_start.main()
    with output.open() as file:
        return list(csv.DictReader(file))


def test_forks_and_turns_have_sets_and_these_recall_some_of_what_is_chosen(rows):
    recalls = [row for row in rows if row["measured"] == "recall"]
    assert {(row["layer"], row["begins"]) for row in recalls} == {
        (layer, begins) for layer in ("2", "8") for begins in ("own", "fork", "turn")
    }
    for row in recalls:
        assert 0 < float(row["recall"]) < 1 and 0 < float(row["chance"]) < 1
        assert row["had"] == ("" if row["begins"] == "own" else "1.0000")
        assert int(row["compared"]) > 0


def test_the_attended_share_is_the_layers_arithmetic(rows):
    chains = {(row["interval"], row["early_sets"]): row for row in rows if row["measured"] == "chains"}
    prompt = 6 * FACTS + 6
    lengths = range(prompt + 1, prompt + 1 + 8 * STEPS + 2)
    layers, selecting, dense = 12, 2, 2

    def share(full_layers):
        attended = sum(full * n + (layers - full) * BUDGET for full, n in zip(full_layers, lengths, strict=True))
        return f"{attended / (layers * sum(lengths)):.4f}"

    early = [dense + selecting, *[selecting] * (len(lengths) - 1)]
    kept = [dense + (selecting if place % 4 == 0 else 0) for place in range(len(lengths))]
    assert chains["1", "off"]["attended"] == share([dense + selecting] * len(lengths))
    assert chains["1", "on"]["attended"] == chains["1", "random"]["attended"] == share(early)
    assert chains["4", "off"]["attended"] == share(kept)
    assert float(chains["1", "off"]["words"]) > 0.7
