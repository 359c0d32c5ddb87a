"""The benchmark of the lossless mode without a model: what it asks of workers, and what it makes of their results."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import lossless
from benchmarks.decode_step_worker import Clock, Outcome
from benchmarks.lossless import COLUMNS, lossless_argv, make_rows, markdown, parse, tokens_of
from benchmarks.lossless_worker import LosslessBench, LosslessOutcome

LOGITS = torch.arange(1.0, 13.0).reshape(2, 2, 3)


def arguments(*more: str) -> Any:
    return parse(["--model-path", "M", "--cases", "4x100", "1x64/2x32", "--acceptance", "0.5", "0.9", *more])


def found(logits: torch.Tensor | None = LOGITS, **more: Any) -> LosslessOutcome:
    """A worker that drafted three tokens in rounds of 10 ms, and two in the last, at one case."""
    timed = {"ms": [10.0, 10.0, 20.0], "drafts": [3, 3, 2], "accepted": 1.25}
    parts = dict.fromkeys(lossless.PARTS, 2.0)
    rounds = {"4x100 0.5": timed, "4x100 0.9": timed}
    return LosslessOutcome(rounds=rounds, parts={"4x100": parts}, logits=logits, machine="G", **more)


def dense() -> Outcome:
    return Outcome(pipelined={"4x100": [5.0, 4.0, 6.0]}, logits=LOGITS)


def test_rounds_answer_one_token_and_the_drafts_that_stay() -> None:
    assert tokens_of([0], 0.9) == 1
    assert tokens_of([2], 0.5) == 1 + 0.5 + 0.25
    assert tokens_of([3, 1], 1.0) == 6


def test_a_row_holds_tokens_a_second_beside_the_baselines() -> None:
    args = arguments("--drafts", "3")
    rows = make_rows(args, args.backend, dense(), found(errors={"1x64/2x32": "pool"}), "C")
    assert [row["acceptance"] for row in rows] == [0.5, 0.9, 0.5, 0.9]
    assert [row["error"] for row in rows] == ["", "", "pool", "pool"] and set(rows[0]) == set(COLUMNS)
    tokens = 2 * (1 + 0.5 + 0.25 + 0.125) + 1.75
    assert rows[0]["tokens_per_s"] == round(4 * tokens / 0.04, 1)
    assert rows[0]["baseline_tokens_per_s"] == 800 and rows[0]["ratio"] == round(4 * tokens / 0.04 / 800, 3)
    assert (rows[0]["round_ms"], rows[0]["drafts"], rows[0]["accepted"], rows[0]["verify_ms"]) == (10, 2.67, 1.25, 2)
    table = markdown(rows)
    assert "| 4 x 100 | 5.0 | 2.0 " in table and "| 2 x 96 (1x64) |" in table and "pool | pool |" in table


@pytest.mark.parametrize(("logits", "finite"), [(LOGITS * 2, True), (LOGITS, False), (None, True)])
def test_no_speed_without_the_right_logits(logits: torch.Tensor | None, finite: bool) -> None:
    args = arguments()
    for row in make_rows(args, args.backend, dense(), found(logits, finite=finite), "C"):
        assert row["error"] == "check failed" and row["tokens_per_s"] == ""
    unchecked = arguments("--no-check")
    assert make_rows(unchecked, args.backend, dense(), found(logits), "C")[0]["tokens_per_s"]


def test_the_servers_arguments_come_before_the_users() -> None:
    args = arguments("--drafts", "5", "--sglang-args=--mem-fraction-static 0.8", "--lim", "budget=64,drafts=unguided")
    argv = lossless_argv(args.backend, args)
    assert argv[-6:] == [
        *("--speculative-algorithm", "LESSISMORE", "--speculative-num-steps", "5"),
        *("--mem-fraction-static", "0.8"),
    ]
    assert args.backend.lim.drafts == "unguided" and args.backend.budget == 64
    assert "--speculative-algorithm" not in lossless.worker_argv(args.baseline, args)
    with pytest.raises(SystemExit):
        arguments("--acceptance", "1.5")


class Worker:
    """The speculative worker as far as the benchmark sees it: rounds of two drafts, of which all stay."""

    speculative_num_steps = 2
    spec_v2_attn_backends = ()

    def __init__(self) -> None:
        self._sampler, self._chooser = SimpleNamespace(drawn_acceptance=None), SimpleNamespace(acceptance=None)
        self._in_flight: list[Any] = []
        self.log: list[Any] = []

    def forward_batch_generation(self, batch: Any) -> Any:
        self.log.append(("round", batch.seq_lens.tolist(), [req.kv_committed_len for req in batch.reqs]))
        lens = torch.tensor([3, 3], dtype=torch.int32)
        return SimpleNamespace(
            new_seq_lens=batch.seq_lens + lens,
            next_draft_input="next",
            accept_lens=lens,
            speculative_num_draft_tokens=3,
        )

    def on_verify_complete_cpu(self, correct: list[int], batch_size: int) -> None:
        self.log.append(("told", correct, batch_size))


def test_the_host_looks_at_a_round_when_the_next_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    batch = SimpleNamespace(
        seq_lens=torch.tensor([10, 10]),
        reqs=[SimpleNamespace(kv_committed_len=10) for _ in range(2)],
        sampling_info=SimpleNamespace(copy_for_forward=lambda: None),
        prepare_for_decode=lambda: worker.log.append("reserved"),
    )
    bench = LosslessBench(SimpleNamespace(lossless=worker), None, torch.cpu, shuffle_slots=False)
    monkeypatch.setattr(bench, "begin", lambda case, tokens: batch)
    bench.clock = Clock(torch.cpu)
    timed = bench.time_rounds(lossless.Forest.parse("2x10"), 0.9, warmup=1, steps=2)
    assert (len(timed["ms"]), timed["drafts"], timed["accepted"]) == (2, [2, 2], 2.0)
    assert worker._sampler.drawn_acceptance == 0.9 and worker._chooser.acceptance.share == pytest.approx(0.9)
    assert worker.log == [
        *("reserved", ("round", [10, 10], [10, 10]), "reserved", ("round", [13, 13], [10, 10]), ("told", [2, 2], 2)),
        *("reserved", ("round", [16, 16], [13, 13]), ("told", [2, 2], 2), ("told", [2, 2], 2)),
    ]


def test_results_go_to_a_file_of_these_columns(tmp_path: Path) -> None:
    args = arguments("--output", str(tmp_path / "out.csv"))
    lossless.append_rows(args.output, COLUMNS, make_rows(args, args.backend, dense(), found(), "C"))
    lossless.require_columns(args.output, COLUMNS)
    assert len(args.output.read_text().splitlines()) == 5
