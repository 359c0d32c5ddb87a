"""The kernel benchmark without a GPU: its arithmetic, its checks, and every section end to end on the reference."""

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_operands, kernel_sections, kernel_times
from benchmarks.kernel_layers import SelectionLayer
from benchmarks.kernel_operands import COPIED_BYTES, Operands, Pool, Selection, Shape, attend_and_score
from benchmarks.kernel_sections import COLUMNS, DTYPES, SECTIONS, Bench, Measured, Row, make_row
from benchmarks.kernel_times import markdown, parse, parse_case
from lim_kernels import choose_tokens

CPU = torch.device("cpu")
SELECTION = Selection(budget=8, recent=2, sinks=1)
TINY = [
    *("--heads", "4", "--kv-heads", "2", "--dim", "8", "--budget", "16"),
    *("--batches", "1", "5", "--cases", "6x40", "1x100", "3x16"),
    *("--forests", "1x40/3x8", "4x20", "--granule", "4", "--dtype"),
]


class CountingTimer:
    """Runs every variant once and calls each of them 10 us; copies at 1000 GB/s."""

    def __init__(self) -> None:
        self.variants: list[int] = []

    def __call__(self, variants: list[Callable[[], object]]) -> list[float]:
        for call in variants:
            call()
        self.variants.append(len(variants))
        return [9.0, 10.0, 11.0]

    def copy(self) -> list[float]:
        best = 2 * COPIED_BYTES / 1e6
        return [best * 1.1, best, best * 1.2]

    def release(self) -> None:
        pass


def dense(operands: Operands) -> list[Callable[[], tuple[Tensor]]]:
    """A baseline in FA3's place."""
    return [lambda call=call: call()[:1] for call in operands.calls(attend_and_score)]  # type: ignore[misc, index]


def top_k(scores: Tensor, slots: Tensor, lens: Tensor, k: int) -> Tensor:
    """A baseline in FlashInfer's place, unordered as that is."""
    best = scores.masked_fill(torch.arange(scores.shape[1]) >= lens.unsqueeze(1), float("-inf")).topk(k).indices
    return slots.gather(1, best.flip(1))


def bench(dtype: str = "bf16", sections: tuple[str, ...] = SECTIONS, baselines: bool = True) -> Bench:
    args = parse([*TINY, dtype, "--sections", *sections])
    return Bench(args, CPU, CountingTimer(), *((dense, top_k) if baselines else ()))


def of(rows: list[Row], **cells: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in cells.items())]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_section_runs_and_agrees_with_the_reference(dtype: str) -> None:
    rows = list(bench(dtype).rows())
    assert {row["error"] for row in rows} == {""}
    assert all(tuple(row) == COLUMNS and row["us"] > 0 for row in rows)
    assert len(of(rows, section="copy")) == 1
    assert len(of(rows, section="sparse_decode")) == 2 * 2
    assert len(of(rows, section="decode_with_scores")) == 3 * 2
    assert len(of(rows, section="selection")) == 3 * 2 * 3 * 3
    assert len(of(rows, section="score_context")) == 3
    assert len(of(rows, section="layer")) == 3 * 2 * 3
    assert len(of(rows, section="grouped")) == 2 * (4 + 1 + 2 * 2)
    assert {row["ratio_to_fa3"] for row in of(rows, section="layer")} == {1.0}
    assert all(float(row["deviation"]) <= 1e-2 for row in rows if row["deviation"] != "")
    assert {row["deviation"] for row in of(rows, op="choose_tokens") + of(rows, op="top-k")} == {"0"}


def test_rows_say_what_they_are_of() -> None:
    rows = list(bench().rows())
    copy = rows[0]
    assert "best, 1000 GB/s" in copy["note"] and copy["gb_per_s"] == pytest.approx(909.1)
    ours, fa3 = of(rows, section="decode_with_scores", batch=6)
    assert (ours["implementation"], fa3["implementation"], ours["context"]) == ("reference", "fa3", 40)
    assert "at least 15.0 us (derived" in ours["note"] and fa3["note"] == ""
    kv_bytes = 2 * 6 * 40 * 2 * 8 * 2
    assert ours["gb_per_s"] == round(kv_bytes / 10 / 1e3, 1)
    sparse = of(rows, section="sparse_decode", batch=5)
    assert {(row["context"], row["tokens"]) for row in sparse} == {("", 16)}
    shared = of(rows, section="selection", batch=1, aggregate="sum", op="score_tokens")
    assert [row["note"] for row in shared] == [
        "heads are independent; 1.000 of decode_with_scores' time",
        "heads share 0.7 of their noise; 1.000 of decode_with_scores' time",
    ]
    within = of(rows, section="layer", batch=3) + of(rows, section="selection", batch=3)
    assert all("within the budget" in row["note"] for row in within)


def test_without_baselines_their_cells_are_blank() -> None:
    rows = list(bench(baselines=False).rows())
    assert not of(rows, implementation="fa3") and not of(rows, implementation="flashinfer")
    assert {row["ratio_to_fa3"] for row in rows} == {""} and {row["error"] for row in rows} == {""}
    assert {row["note"] for row in of(rows, section="decode_with_scores")} == {""}


def test_sections_are_independent_and_attention_is_measured_once() -> None:
    alone = list(bench(sections=("selection",)).rows())
    assert {row["section"] for row in alone} == {"copy", "selection"}
    assert all("of decode_with_scores" in row["note"] for row in alone[1:])
    both = bench(sections=("decode_with_scores", "layer"))
    list(both.rows())
    assert isinstance(both.timer, CountingTimer)
    assert len(both.timer.variants) == 3 * (1 + 1 + 2 * 3)


def test_calls_rotate_over_caches_and_slots() -> None:
    sections = bench(sections=("layer",))
    list(sections.rows())
    assert isinstance(sections.timer, CountingTimer)
    assert set(sections.timer.variants) == {4 * 16}
    large = Shape(32, 8, 128, torch.bfloat16)
    assert [large.slot_sets(tokens) for tokens in (2048, 16 * 2048, 16 * 32768)] == [16, 1, 1]
    assert large.kv_bytes(16 * 32768) == 2 << 30


def test_slots_of_a_draw_are_scattered_distinct_and_never_the_padding() -> None:
    operands = Pool(Shape(4, 2, 8, torch.float32), 16 * 3 * 40, CPU).draw(3, 40)
    slots = torch.stack(operands.slots).flatten()
    assert operands.slots[0].dtype == torch.int32 and len(operands.slots) == 16
    assert len(slots.unique()) == len(slots) and int(slots.min()) == 1
    assert not torch.equal(slots, slots.sort().values)
    assert all(bool(cache[0].isnan().all()) and bool(cache[1:].isfinite().all()) for cache, _ in operands.caches)


@pytest.mark.parametrize("spoil", [lambda out: out * 1.05, lambda out: out * float("nan")])
def test_a_wrong_output_has_a_deviation_but_no_time(spoil: Callable[[Tensor], Tensor]) -> None:
    def wrong(operands: Operands) -> list[Callable[[], tuple[Tensor]]]:
        return [lambda call=call: (spoil(call()[0]),) for call in dense(operands)]  # type: ignore[misc]

    spoiled = Bench(parse([*TINY, "bf16"]), CPU, CountingTimer(), wrong)
    rows = list(spoiled.rows())
    for row in of(rows, implementation="fa3"):
        assert (row["error"], row["us"]) == ("check failed", "") and row["deviation"] != ""
    assert {row["ratio_to_fa3"] for row in rows} == {""}
    assert {row["error"] for row in of(rows, implementation="reference")} == {""}


def test_one_wrong_row_of_logits_or_of_the_last_request_is_enough() -> None:
    operands = Pool(Shape(4, 2, 8, torch.bfloat16), 16 * 6 * 40, CPU).draw(6, 40)
    right = operands.calls(attend_and_score)[0]()
    assert isinstance(right, tuple)
    assert kernel_operands.decode_deviation(operands, *right) < 1e-2
    for i in range(3):
        wrong = [tensor.clone() for tensor in right]
        wrong[i][-1] *= 2
        assert kernel_operands.decode_deviation(operands, *wrong) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("attends", ["context", "set"])
def test_every_wrong_part_of_a_selection_layer_shows(attends: str) -> None:
    operands = Pool(Shape(4, 2, 8, torch.bfloat16), 16 * 6 * 40, CPU).draw(6, 40)
    layer = SelectionLayer(SELECTION, "max", attends, "reference")
    right = operands.calls(layer)[0]()
    assert isinstance(right, tuple) and layer.deviation(operands, right) < 1e-2
    for i in range(3):
        wrong = [tensor.clone() for tensor in right]
        wrong[i][-1] *= 2
        # Twice the logits may lead to another set.
        assert layer.deviation(operands, tuple(wrong)) == pytest.approx(1, rel=0.05)
    out, lse, logits, chosen, counts = right
    assert layer.deviation(operands, (out * float("nan"), lse, logits, chosen, counts)) != 0
    assert layer.deviation(operands, (out, lse, logits, chosen.flip(0), counts)) == 1
    other = SelectionLayer(SELECTION, "max", "set" if attends == "context" else "context", "reference")
    assert other.deviation(operands, right) > 0.1, "what it attends to would not show"


def test_at_most_four_rows_are_checked_the_last_among_them() -> None:
    assert [kernel_operands.checked_rows(batch) for batch in (1, 2, 4, 256)] == [
        [0],
        [0, 1],
        [0, 1, 2, 3],
        [0, 85, 170, 255],
    ]


def test_a_kernel_that_raises_costs_its_own_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(operands: Operands) -> list[Callable[[], tuple[Tensor]]]:
        raise RuntimeError("no kernel for this\nsecond line")

    def broken_top_k(*given: object) -> Tensor:
        raise torch.OutOfMemoryError("large")

    rows = list(Bench(parse([*TINY, "bf16"]), CPU, CountingTimer(), broken, broken_top_k).rows())
    assert {row["error"] for row in of(rows, implementation="fa3")} == {"RuntimeError: no kernel for this"}
    assert {row["error"] for row in of(rows, implementation="flashinfer")} == {"out of memory"}
    assert {row["error"] for row in of(rows, implementation="reference")} == {""}
    assert "Traceback" in capsys.readouterr().err


def test_a_case_that_cannot_be_set_up_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(batch: int, heads: int, tokens: int, share: float, device: torch.device) -> Tensor:
        if tokens == 100:
            raise torch.OutOfMemoryError("large")
        return kernel_operands.head_logits(batch, heads, tokens, share, device)

    monkeypatch.setattr(kernel_sections, "head_logits", draw)
    rows = list(bench(sections=("selection",)).rows())
    assert [(row["batch"], row["context"]) for row in of(rows, error="out of memory")] == [(1, 100)]
    assert len(of(rows, section="selection", error="")) == 2 * 2 * 3 * 3


def scores_and_set() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores 0 … 19 of two rows, their lengths, and the reference's set of eight."""
    scores = torch.arange(20.0).repeat(2, 1)
    lens = torch.tensor([20, 15], dtype=torch.int32)
    return scores, lens, *choose_tokens(scores, lens, SELECTION)


def test_sets_compare_in_any_order_and_every_difference_counts() -> None:
    scores, lens, positions, counts = scores_and_set()
    deviation = partial(kernel_operands.set_deviation, scores=scores, lens=lens, selection=SELECTION)
    assert deviation(positions.flip(1), counts) == 0
    wrong = positions.clone()
    wrong[1, 3] = 3
    assert deviation(wrong, counts) == pytest.approx(2 / 16)
    twice = positions.clone()
    twice[0, 1] = twice[0, 2]
    assert deviation(twice, counts) > 0
    assert deviation(positions, counts - 1) > 0


def test_only_tokens_scored_like_the_last_chosen_may_be_swapped() -> None:
    scores, lens, positions, counts = scores_and_set()
    kept, dropped = int(positions[0, 1]), int(positions[0, 1]) - 1
    scores[0, dropped] = scores[0, kept] - 1e-6
    swapped = positions.clone()
    swapped[0, 1] = dropped
    assert kernel_operands.set_deviation(swapped, counts, scores, lens, SELECTION) == 0
    scores[0, dropped] = scores[0, kept] - 1e-3
    assert kernel_operands.set_deviation(swapped, counts, scores, lens, SELECTION) > 0
    swapped = positions.clone()
    swapped[0, 0] = dropped  # instead of the sink
    scores[0, dropped] = scores[0, kept]
    assert kernel_operands.set_deviation(swapped, counts, scores, lens, SELECTION) > 0


def test_scores_are_compared_where_they_are_defined() -> None:
    scores, lens, *_ = scores_and_set()
    lens[1] = 8  # within the budget
    ours = scores.clone()
    ours[0, 0] = ours[0, 19] = float("nan")
    ours[1] = float("nan")
    assert kernel_operands.score_deviation(ours, scores, lens, SELECTION) == 0
    ours[0, 5] = float("-inf")  # not listed, and not needed
    assert kernel_operands.score_deviation(ours, scores, lens, SELECTION) == 0
    ours[0, 16] = float("-inf")
    assert kernel_operands.score_deviation(ours, scores, lens, SELECTION) > 0
    for wrong in (scores[0, 6] + 0.5, float("nan")):
        ours = scores.clone()
        ours[0, 6] = wrong
        assert not kernel_operands.score_deviation(ours, scores, lens, SELECTION) <= kernel_operands.SCORE_SLACK


def test_a_slot_of_another_row_has_no_position() -> None:
    slots = torch.tensor([[3, 1, 7], [2, 9, 4]], dtype=torch.int32)
    chosen = torch.tensor([[7, 3, 9, -1], [4, 2, 0, 3]], dtype=torch.int32)
    assert kernel_operands.slots_to_positions(chosen, slots).tolist() == [[2, 0, -1, -1], [2, 0, -1, -1]]


def test_logits_of_heads_that_share_noise_agree() -> None:
    for share, expected in ((0.0, 0.0), (0.7, 0.49)):
        logits = kernel_operands.head_logits(1, 2, 20000, share, CPU)[0]
        assert float(logits.std()) == pytest.approx(3, rel=0.05)
        assert float(torch.corrcoef(logits)[0, 1]) == pytest.approx(expected, abs=0.05)


def test_rows_have_percentiles_bandwidth_and_ratio() -> None:
    measured = Measured(0.00123, [1.0, 2.0, 3.0, 4.0, 5.0])
    row = make_row(measured, kv_bytes=6000, copy_gb_per_s=4.0, fa3_us=2.0, section="layer")
    assert (row["us"], row["p20"], row["p80"]) == (3.0, 1.8, 4.2)
    assert (row["gb_per_s"], row["share_of_copy"], row["ratio_to_fa3"]) == (2.0, 0.5, 1.5)
    assert (row["deviation"], row["error"], row["section"]) == ("0.0012", "", "layer")
    failed = make_row(Measured(0.5, error="check failed"), kv_bytes=6000, copy_gb_per_s=4.0, fa3_us=2.0)
    assert [failed[c] for c in ("us", "gb_per_s", "ratio_to_fa3", "deviation")] == ["", "", "", "0.5"]


def test_a_table_a_section_without_blank_columns() -> None:
    rows = [
        make_row(Measured(times=[2.0]), section="copy", op="copy", machine="M"),
        make_row(Measured(0.0, [3.0]), section="layer", op="a", batch=2),
        make_row(Measured(error="out of memory"), section="layer", op="b", batch=3),
    ]
    assert markdown(rows).splitlines() == [
        "### copy",
        "",
        "| op | us | p20 | p80 |",
        "| --- | --- | --- | --- |",
        "| copy | 2.0 | 2.0 | 2.0 |",
        "",
        "### layer",
        "",
        "| op | batch | us | p20 | p80 | deviation | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 2 | 3.0 | 3.0 | 3.0 | 0 |  |",
        "| b | 3 |  |  |  |  | out of memory |",
    ]


def test_rows_reach_the_file_at_once_under_one_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "out.csv"

    def crash() -> Iterator[Row]:
        yield from bench(sections=("sparse_decode",)).rows()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kernel_times.report(crash(), "M", path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["section"] for row in read] == (["copy"] + ["sparse_decode"] * 4) * 2
    assert {row["machine"] for row in read} == {"M"} and float(read[1]["us"]) == 10
    assert "sparse_decode sparse_decode reference 1 10.0 us" in capsys.readouterr().err


def test_cases() -> None:
    assert parse_case("16x32768") == (16, 32768)
    for wrong in ("16", "0x5", "16x", "16x32K", "-1x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="16x32768"):
            parse_case(wrong)


def test_the_command_line() -> None:
    args = parse([])
    assert args.cases == [(16, 32768), (64, 8192), (256, 2048), (1, 32768), (4, 131072)]
    assert (args.heads, args.kv_heads, args.dim, args.dtype, args.budget) == (32, 8, 128, "bf16", 2048)
    assert args.replays >= 9 and parse(["--quick"]).replays == kernel_times.QUICK_REPLAYS
    assert args.sections == list(SECTIONS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--heads", "5"], "multiple of --kv-heads 8"),
        (["--budget", "4"], "at least 8"),
        (["--replays", "0"], "at least 1"),
        (["--sections", "all"], "invalid choice"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert said in capsys.readouterr().err


def test_a_missing_baseline_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise ImportError("no module\nmore")

    assert kernel_times.load("FA3", missing) is None
    assert capsys.readouterr().err == "no FA3: its figures stay blank (ImportError: no module)\n"


@pytest.mark.parametrize(
    ("argv", "loaded"),
    [
        ([], ["fa3", "flashinfer", "cascades"]),
        (["--no-flashinfer"], ["fa3"]),
        (["--sections", "layer"], ["fa3"]),
        (["--sections", "grouped"], ["fa3", "cascades"]),
    ],
)
def test_flashinfer_is_loaded_only_where_it_is_wanted(
    argv: list[str], loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kernel_times, "load_fa3", lambda shape: asked.append("fa3") or dense)
    monkeypatch.setattr(kernel_times, "load_flashinfer", lambda device: asked.append("flashinfer") or top_k)
    monkeypatch.setattr(
        kernel_times, "flashinfer_cascades", lambda shape, names: asked.append("cascades") or {"cascade": 1}
    )
    wanted = top_k if "flashinfer" in loaded else None, {"cascade": 1} if "cascades" in loaded else {}
    assert kernel_times.load_baselines(parse(argv), CPU) == (dense, *wanted)
    assert asked == loaded


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kernel_times"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        kernel_times.main()
