"""Ranks of a benchmark's worker: all do the job, and none is left when one of them fails."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import decode_step_worker
from benchmarks.decode_step_worker import NoRoom, Outcome
from sgl_lim.programs.server_process import is_running
from support.waiting import wait_until


def run(folder: Path, ranks: int, fails: int = -1) -> "subprocess.CompletedProcess[str]":
    """The program, which has to end by itself; see `rank_jobs.py`."""
    command = [sys.executable, Path(__file__).with_name("rank_jobs.py"), folder, str(ranks), str(fails)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def none_is_left(folder: Path) -> bool:
    """Whether no rank's process runs any more."""
    pids = [int(path.read_text().split()[0]) for path in folder.glob("*.rank")]
    return not any(is_running(process) for process in psutil.process_iter() if process.pid in pids)


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_ranks_do_the_job_and_meet_at_one_port(ranks: int, tmp_path: Path) -> None:
    done = run(tmp_path, ranks)
    assert done.returncode == 0 and done.stdout == "the first rank reports\n", done.stderr
    told = [path.read_text().split() for path in tmp_path.glob("*.rank")]
    assert len({pid for pid, _ in told}) == ranks and len({port for _, port in told}) == 1


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    done = run(tmp_path, 3, fails=2)
    assert done.returncode == 1 and "rank 2 ended with 1" in done.stderr and not done.stdout
    wait_until(lambda: none_is_left(tmp_path), "all ranks ended")


def test_the_first_rank_reports_its_own_failure(tmp_path: Path) -> None:
    done = run(tmp_path, 3, fails=0)
    assert done.returncode == 0 and done.stdout == "the first rank reports\n", done.stderr
    wait_until(lambda: none_is_left(tmp_path), "all ranks ended")


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_what_all_ranks_find_leaves_the_next_case(ranks: int) -> None:
    def fail(error: Exception) -> SimpleNamespace:
        def time_alone(*_: object) -> None:
            raise error

        return SimpleNamespace(time_alone=time_alone, runner=SimpleNamespace(device="cpu"))

    job, outcome = {"warmup": 0, "steps": 1, "ranks": ranks}, Outcome()
    decode_step_worker.time_case(fail(NoRoom("pool")), "1x8", job, outcome)
    assert outcome.errors == {"1x8": "pool"}
    if ranks == 1:
        decode_step_worker.time_case(fail(RuntimeError("odd")), "1x9", job, outcome)
    else:
        with pytest.raises(RuntimeError, match="odd"):
            decode_step_worker.time_case(fail(RuntimeError("odd")), "1x9", job, outcome)
    assert "odd" in outcome.errors["1x9"]
