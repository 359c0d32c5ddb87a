"""Figures: the numbers that are plotted, and that a file comes of it."""

import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from benchmarks import plot

MACHINE = "NVIDIA H100 80GB HBM3, driver 580.1; Python 3.12.3; torch 2.11.0; triton 3.6.0; sglang 0.5.17; commit abc"
STEPS = {
    "fa3": {(1, 2048): 5.4, (16, 2048): 6.6, (16, 8192): 9.8, (16, 32768): 22.7},
    "lessismore:budget=2048": {(1, 2048): 5.5, (16, 2048): 6.6, (16, 8192): 7.0, (16, 32768): 9.1},
}


def steps_csv(path: Path) -> Path:
    lines = ["backend,batch,context,step_ms,ratio,slots,error,machine"]
    for backend, steps in STEPS.items():
        for (batch, context), ms in steps.items():
            ratio = round(STEPS["fa3"][batch, context] / ms, 3)
            lines.append(f'{backend},{batch},{context},{ms},{ratio},contiguous,,"{MACHINE}"')
        lines.append(f'{backend},64,32768,,,contiguous,pool,"{MACHINE}"')
    path.write_text("\n".join(lines))
    return path


def throughput_csv(path: Path) -> Path:
    rows = ["server,input_len,output_len,tokens_per_s", "fa3,2048,512,4000", "lim,2048,512,5200.5"]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    return plot.read_rows(steps_csv(tmp_path / "steps.csv"))


def test_failed_rows_are_left_out(rows: list[dict[str, str]], tmp_path: Path) -> None:
    assert len(rows) == 8
    (tmp_path / "empty.csv").write_text("backend,error\nfa3,pool\n")
    with pytest.raises(SystemExit, match="no row"):
        plot.read_rows(tmp_path / "empty.csv")


def test_lines_are_sorted_points_of_the_fixed_value(rows: list[dict[str, str]]) -> None:
    assert plot.lines(rows[::-1], "batch", 16, "context")["fa3"] == [(2048, 6.6), (8192, 9.8), (32768, 22.7)]
    assert plot.lines(rows, "context", 2048, "batch")["lessismore:budget=2048"] == [(1, 5.5), (16, 6.6)]
    assert plot.lines(rows, "batch", 3, "context") == {"fa3": [], "lessismore:budget=2048": []}


def test_panels_are_fixed_where_most_was_measured(rows: list[dict[str, str]]) -> None:
    assert plot.most_covered(rows, "batch", "context") == 16
    assert plot.most_covered(rows, "context", "batch") == 2048
    assert plot.most_covered([r for r in rows if r["context"] == "2048"], "batch", "context") == 16


def test_ratios_leave_the_baseline_out(rows: list[dict[str, str]]) -> None:
    found = plot.ratios(rows)
    assert list(found) == ["lessismore:budget=2048"]
    assert found["lessismore:budget=2048"] == {
        "1 x 2,048": 0.982,
        "16 x 2,048": 1.0,
        "16 x 8,192": 1.4,
        "16 x 32,768": 2.495,
    }


def test_slots_are_named_where_they_differ(rows: list[dict[str, str]]) -> None:
    shuffled = [{**row, "slots": "shuffled"} for row in rows]
    assert set(plot.lines(rows + shuffled, "batch", 16, "context")) == {
        f"{backend}, {slots} slots" for backend in STEPS for slots in ("contiguous", "shuffled")
    }


def test_settings_are_named_where_they_differ(rows: list[dict[str, str]]) -> None:
    more = [
        {**row, "backend": f"{row['backend']},aggregate=max", "pipelined_ratio": "2", "ratio": ""} for row in rows[4:]
    ]
    more = [{**row, "prefixes": "1x1024"} for row in more]
    assert set(plot.lines(rows + more, "batch", 16, "context")) == {"fa3", "lessismore", "lessismore:aggregate=max"}
    assert set(plot.ratios(rows + more, "pipelined_ratio")["lessismore:aggregate=max"]) == {
        "1 on 1x1024",
        "16 on 1x1024",
    }


def test_throughputs(tmp_path: Path) -> None:
    found = plot.throughputs(plot.read_rows(throughput_csv(tmp_path / "t.csv")))
    assert found == {"fa3": {"2,048 in, 512 out": 4000}, "lim": {"2,048 in, 512 out": 5200.5}}
    with pytest.raises(SystemExit, match="no row has steady; columns are server, input_len"):
        plot.throughputs(plot.read_rows(tmp_path / "t.csv"), "steady")


def test_the_caption_is_short(rows: list[dict[str, str]]) -> None:
    assert plot.machines(rows) == "NVIDIA H100 80GB HBM3; torch 2.11.0; sglang 0.5.17"
    assert plot.machines([*rows, {"machine": "AMD EPYC, 2 threads; torch 2.11.0"}]).endswith(
        "| AMD EPYC, 2 threads; torch 2.11.0"
    )
    assert plot.machines([{}]) == ""


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"pip install .*'matplotlib>=.*'"):
        plot.require_matplotlib()


def test_the_figures_hold_the_numbers(rows: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    left, right = plot.decode_figure(rows).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[6.6, 9.8, 22.7], [6.6, 7.0, 9.1]]
    assert [list(line.get_xdata()) for line in right.lines] == [[1, 16], [1, 16]]
    (bars,) = plot.speedup_figure(rows).axes
    assert [bar.get_height() for bar in bars.patches] == [0.982, 1.0, 1.4, 2.495]
    (bars,) = plot.throughput_figure(plot.read_rows(throughput_csv(tmp_path / "t.csv"))).axes
    assert [bar.get_height() for bar in bars.patches] == [4000, 5200.5]


def accuracy_csv(path: Path) -> Path:
    path.write_text(
        "method,budget,whole,whole_low,whole_high,agreement,agreement±,attended,attended_tokens,items,size,device,torch\n"
        "full,,1.0,0.98,1.0,1.0,0.0,1.0,2179.5,200,330/48,CPU,2.11\n"
        "quest,128,0.5,0.4,0.6,0.9,0.02,0.05,400,200,330/48,CPU,2.11\n"
        "quest,64,0.1,0.05,0.2,0.8,0.03,0.03,300,200,330/48,CPU,2.11\n"
    )
    return path


def test_accuracies_stand_beside_the_tokens_they_took(tmp_path: Path) -> None:
    rows = plot.read_rows(accuracy_csv(tmp_path / "a.csv"))
    full, low, high = (2179.5, 100, 100, 98, 100), (300, 3, 10, 5, 20), (400, 5, 50, 40, 60)
    found = {name: [astuple(point) for point in points] for name, points in plot.accuracies(rows).items()}
    assert found == {"full": [full], "quest": [low, high]}
    assert astuple(plot.accuracies(rows, "agreement", ["quest"])["quest"][1]) == pytest.approx((400, 5, 90, 88, 92))
    assert list(plot.accuracies(rows, methods=["quest"])) == ["quest"]
    with pytest.raises(SystemExit, match="no row of tidaldecode has whole"):
        plot.accuracies(rows, methods=["quest", "tidaldecode"])
    with pytest.raises(SystemExit, match="no row has loss; columns are method"):
        plot.accuracies(rows, "loss")


@pytest.mark.parametrize("figure", ["decode", "speedup", "throughput", "accuracy"])
def test_a_png_is_written(figure: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = {"throughput": throughput_csv, "accuracy": accuracy_csv}.get(figure, steps_csv)(tmp_path / "in.csv")
    plot.main([figure, str(source), "-o", str(tmp_path / "new" / "out.png")])
    assert (tmp_path / "new" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_choices_of_selection_layers_are_told_apart_and_the_last_measurement_counts(tmp_path: Path) -> None:
    row = {"method": "lessismore", "budget": "64", "attended": "0.1", "attended_tokens": "9"}
    rows = [
        {**row, "selection_layers": layers, "whole": whole} for layers, whole in (("1", "0"), ("1", "1"), ("2", "0.5"))
    ]
    assert {name: [p.value for p in points] for name, points in plot.accuracies(rows).items()} == {
        "lessismore 1": [100],
        "lessismore 2": [50],
    }


def test_accuracies_are_drawn_against_all_layers_and_against_sparse_ones(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    left, right = plot.accuracy_figure(plot.read_rows(accuracy_csv(tmp_path / "a.csv")), methods=["quest"]).axes
    assert [
        [list(c.lines[0].get_xdata()), list(c.lines[0].get_ydata())] for c in left.containers + right.containers
    ] == [
        [[300, 400], [10, 50]],
        [[3, 5], [10, 50]],
    ]


def test_a_baseline_alone_has_no_speedup(rows: list[dict[str, str]]) -> None:
    with pytest.raises(SystemExit, match="another backend"):
        plot.speedup_figure(rows[:4])
