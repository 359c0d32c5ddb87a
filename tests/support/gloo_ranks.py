"""A tensor-parallel group of processes that talk by gloo; it has the collectives of SGLang's and counts their bytes."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed


class GlooGroup:
    """What `RankExchange` asks of SGLang's `GroupCoordinator`; `received` counts the bytes that come from others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank_in_group, self.world_size, self.received = rank, world_size, 0

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Tensors of all ranks, one after the other."""
        assert dim == 0 and tensor.is_contiguous()
        gathered = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        distributed.all_gather_into_tensor(gathered, tensor)
        self.received += gathered.nbytes - tensor.nbytes
        return gathered

    def all_to_all_single(self, output: Tensor, given: Tensor) -> None:
        """The part of each rank that is this one's."""
        distributed.all_to_all_single(output, given)
        self.received += output.nbytes // self.world_size * (self.world_size - 1)


def run_ranks(number: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(group, *arguments)`, a function of a module, returns on each of so many processes."""
    # Processes begin where a server of theirs has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.gloo_ranks", work.__module__])
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_run, args=(rank, number, folder, work, arguments)) for rank in range(number)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        failed = [rank for rank, process in enumerate(started) if process.exitcode != 0]
        assert not failed, f"ranks {failed} of {number} failed"
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(number)]


def _run(rank: int, number: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=number,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(work(GlooGroup(rank, number), *arguments), os.path.join(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()
