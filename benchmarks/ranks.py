"""A worker on several devices: one process for each tensor-parallel rank. All do the same, and the first reports."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from sgl_lim.programs.server_process import claim_port


def on_every_rank(work: Callable[[dict[str, Any]], bool], job: dict[str, Any]) -> None:
    """Do a worker's job, on `job["ranks"]` ranks at once.

    This process is the first rank. The others are its children, and end with it. If one of them fails, this process
    ends too, because the device would wait for that rank for ever.

    Args:
        work: does the job as the rank `job["rank"]`, and returns whether all went well. Top-level in its module.
        job: its `argv` are SGLang's arguments, which here get a port at which the ranks meet.
    """
    if job["ranks"] == 1:
        work({**job, "rank": 0})
        return
    job = {**job, "argv": [*job["argv"], "--nccl-port", str(claim_port())]}
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_follow, args=(work, {**job, "rank": rank}), daemon=True)
        for rank in range(1, job["ranks"])
    ]
    for other in others:
        other.start()
    given_up = threading.Event()
    watch = threading.Thread(target=_end_with, args=(others, given_up), daemon=True)
    watch.start()
    if not work({**job, "rank": 0}):
        given_up.set()
        for other in others:
            other.kill()
    watch.join()


def _follow(work: Callable[[dict[str, Any]], bool], job: dict[str, Any]) -> None:
    """A rank other than the first."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    sys.exit(0 if work(job) else 1)


def _end_with_the_first() -> None:
    """End this process, whatever it waits for, when the one that started it is gone."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _end_with(others: Sequence[BaseProcess], given_up: threading.Event) -> None:
    """Wait for the other ranks; end this process if one of them fails, unless it has given up itself."""
    running = list(others)
    while running:
        ended = connection.wait([other.sentinel for other in running])
        for other in [other for other in running if other.sentinel in ended]:
            running.remove(other)
            other.join()
            if other.exitcode and not given_up.is_set():
                print(f"rank {others.index(other) + 1} ended with {other.exitcode}", file=sys.stderr, flush=True)
                os._exit(1)
