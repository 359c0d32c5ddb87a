"""Measures what the passes of a round cost on this machine, before the server takes requests.

The passes run as they will, over rows of the request pool that are set to distinct slots for as long. The pool is
empty then: what these passes write there, nobody reads.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgl_lim.methods import Role
from sgl_lim.serving import metrics
from sgl_lim.serving.lossless.cost import Measured, PassCost, RoundCosts, rising
from sgl_lim.serving.lossless.passes import Passes, synchronize
from sgl_lim.serving.lossless.rounds import Rows, decode_batch, verify_batch
from sgl_lim.serving.state import LimState

logger = logging.getLogger(__name__)

_ROWS = (1, 4, 16, 64, 256)
_LONGEST = {"cpu": 1024, "cuda": 32768}
_REPEATS = {"cpu": 1, "cuda": 4}
_SHORT = 64
_NOISE = 1 << 16


def told(found: dict[str, Measured]) -> str:
    """What passes take at one batch size and its longest context, for the log."""
    tokens = next(iter(found.values())).points[-1][0]
    rows = next(iter(found.values())).rows
    times = ", ".join(f"{name} {1e3 * point.points[-1][1]:.2f} ms" for name, point in found.items())
    return f"{rows} requests of {tokens / rows:.0f} tokens: {times}"


class Meter:
    """Times passes over made-up rows.

    Args:
        runner: SGLang's model runner, pools ready and graphs captured.
        most_rows: largest batch that drafts.
    """

    def __init__(self, runner: Any, passes: Passes, most_rows: int) -> None:
        self._runner, self._passes, self._most = runner, passes, max(passes.verify)
        self._most_rows = most_rows
        self._table: Tensor = runner.req_to_token_pool.req_to_token
        self._slots = runner.token_to_kv_pool.size

    @torch.no_grad()
    def measure(self) -> RoundCosts:
        """Costs of all passes. Takes seconds; leaves the request pool as it was."""
        started = time.perf_counter()
        most = min(self._runner.max_running_requests, len(self._table) - 1, self._most_rows)
        sizes = [rows for rows in _ROWS if rows < most] + [most]
        if self._runner.device == "cpu":
            sizes = sorted({1, min(8, most)})
        points: dict[str, list[Measured]] = {}
        with metrics.unpublished():
            for rows in sizes:
                found = self._at(rows)
                logger.info("sgl-lim: %s", told(found))
                for name, point in found.items():
                    points.setdefault(name, []).append(point)
            self._forget(torch.arange(1, sizes[-1] + 1, device=self._table.device))
        verify = {drafts: PassCost(tuple(points[f"verify{drafts}"])) for drafts in self._passes.verify}
        costs = RoundCosts(PassCost(tuple(points["draft"])), PassCost(tuple(points["plain"])), verify)
        logger.info("sgl-lim: measured drafts and verification in %.1f s", time.perf_counter() - started)
        return costs

    def _forget(self, rows: Tensor) -> None:
        """Nothing of what ran on these rows of the request pool is left, nor counted."""
        self._table.index_fill_(0, rows, 0)
        lim: LimState = self._passes.plain.backend.lim
        lim.counters.clear()
        if lim.drafts is not None:
            lim.drafts.read.zero_()
            if lim.drafts.sets is not None:
                lim.drafts.sets.forget(rows)

    def _at(self, rows: int) -> dict[str, Measured]:
        """Costs by pass at one batch size."""
        # Dense backends have no places beyond the context.
        room = min(self._runner.model_config.context_len, self._slots // rows) - self._most - 2
        budget = self._passes.plain.backend.lim.method.budget
        # Drafts of longer rows read no more than the budget.
        wanted = (_SHORT, 2 * budget, _LONGEST[self._runner.device])
        lengths = sorted({max(1, min(length, wanted[-1], room)) for length in wanted})
        seconds = [(rows * length, self._with(rows, length)) for length in lengths]
        return {name: rising(rows, [(tokens, by[name]) for tokens, by in seconds]) for name in seconds[0][1]}

    def _with(self, rows: int, length: int) -> dict[str, float]:
        """Seconds by pass with rows of so many tokens."""
        made = self._rows(rows, length)
        tokens = torch.ones(rows, self._most + 1, dtype=torch.int64, device=made.lens.device)
        # Drafts read what verification chose, so that comes first.
        passes: dict[str, Callable[[], Any]] = {}
        for drafts, one in self._passes.verify.items():
            some, width = made.first(drafts), tokens[:, : drafts + 1]
            passes[f"verify{drafts}"] = lambda one=one, some=some, width=width: one.run(  # type: ignore[misc]
                self._runner, verify_batch(some, width)
            )
        step = tokens[:, 0].contiguous()
        passes["draft"] = lambda: self._passes.draft.run(self._runner, decode_batch(made, step, 0))
        passes["plain"] = lambda: self._passes.plain.run(self._runner, decode_batch(made, step, 0))
        return {name: self._seconds(run) for name, run in passes.items()}

    def _seconds(self, run: Callable[[], Any]) -> float:
        device = self._runner.device
        if device != "cpu":
            run()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(_REPEATS[device]):
            run()
        synchronize(device)
        return (time.perf_counter() - started) / _REPEATS[device]

    def _write_keys(self, slots: int) -> None:
        """Give selection layers keys to rank: those of an empty pool are all equal, and ties take longest to break."""
        lim: LimState = self._passes.plain.backend.lim
        for layer in (layer for layer, role in enumerate(lim.roles) if role is Role.SELECT):
            keys = lim.pool.get_key_buffer(layer)[1 : slots + 1]
            for part in keys.split(_NOISE):
                part.copy_(torch.randn(part.shape, device=part.device))

    def _rows(self, rows: int, length: int) -> Rows:
        """Rows 1 to `rows` of the pool, each on slots of its own."""
        device, width = self._table.device, length + self._most + 1
        slots = 1 + torch.arange(rows * width, device=device) % (self._slots - 1)
        self._write_keys(rows * width)
        self._table[1 : rows + 1, :width] = slots.view(rows, width).to(self._table.dtype)
        lens = torch.full((rows,), length, dtype=torch.int64, device=device)
        positions = lens[:, None] + torch.arange(self._most + 1, device=device)
        indices = torch.arange(1, rows + 1, device=device)
        tail = self._table[indices[:, None], positions].to(torch.int64)
        return Rows(indices, lens, torch.full((rows,), length, dtype=torch.int64), positions, tail)
