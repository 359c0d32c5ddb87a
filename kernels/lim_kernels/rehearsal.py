"""Compiles kernels before they are needed, beside one another.

Triton compiles a kernel when it is first launched with arguments of its kind, and its launch waits. Inside `rehearsed`
operators run on tensors of torch's "meta" device, which have shapes alone: launches compile and run nothing. Most of a
compilation (LLVM, ptxas) leaves Python's lock to other threads.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

MOST_THREADS = 16


@contextmanager
def rehearsed(threads: int | None = None) -> Iterator[triton.AsyncCompileMode]:
    """Launches inside compile their kernels instead; at the end all are compiled, and `raw_futures` has one for each.

    Nothing else may launch Triton kernels in this process meanwhile.

    Args:
        threads: that compile; None: one a core, MOST_THREADS at most.
    """
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return run(kernel, *arguments, grid=grid, warmup=True, **named)

    threads = threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool) as mode:
        JITFunction.run = compile_only
        try:
            yield mode
        finally:
            JITFunction.run = run
