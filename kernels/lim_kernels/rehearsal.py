"""Compiles kernels before they are needed, beside one another.

Triton compiles a kernel when it is first launched with arguments of its kind, and its launch waits. Inside `rehearsed`
operators run on tensors of torch's "meta" device, which have shapes alone: launches compile and run nothing. Most of a
compilation (LLVM, ptxas) leaves Python's lock to other threads.
"""

import os
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import lim_kernels

MOST_THREADS = 16
MULTIPROCESSORS = 132
"""Of an H200."""


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


class AbsentDevice:
    """What Triton asks its driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Its default stream."""
        return 0


def modules() -> list[Any]:
    """All of this package."""
    return [import_module(found.name) for found in pkgutil.walk_packages(lim_kernels.__path__, "lim_kernels.")]


def use_absent_device(capability: int) -> None:
    """From now on compile for a GPU that need not be there, such as 90 for 9.0, with MULTIPROCESSORS."""
    driver.set_active(AbsentDevice(capability))
    for module in modules():
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: MULTIPROCESSORS
