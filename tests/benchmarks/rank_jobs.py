"""A program of test_ranks.py: ranks that meet, of which one may fail. `rank_jobs.py FOLDER RANKS FAILS`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.ranks import on_every_rank


def work(job: dict[str, Any]) -> bool:
    """Leave a file with the port, and wait for the others' files, as devices wait for one another."""
    folder = Path(job["folder"])
    if job["rank"] == job["fails"]:
        return False
    (folder / f"{job['rank']}.new").write_text(f"{os.getpid()} {job['argv'][-1]}")
    (folder / f"{job['rank']}.new").rename(folder / f"{job['rank']}.rank")
    while len(list(folder.glob("*.rank"))) < job["ranks"]:
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    folder, ranks, fails = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    on_every_rank(work, {"folder": folder, "ranks": ranks, "fails": fails, "argv": ["--tp-size", str(ranks)]})
    print("the first rank reports")
