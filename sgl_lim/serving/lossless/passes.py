"""The passes of a round: by which attention backend and which graphs the one model runs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.utils.common import get_available_gpu_memory

from sgl_lim.serving.backend import add_sparse_decode
from sgl_lim.serving.lossless import versions

logger = logging.getLogger(__name__)

LOGITS_BYTES = 1 << 30
"""Most memory for the float32 logits of one verification, where no graph has memory for them."""


@dataclass(frozen=True)
class Pass:
    """One way of running the model."""

    backend: Any
    """An attention backend."""
    graphs: Any | None = None
    """SGLang's runner of the graphs that were captured with this backend; None: it runs eagerly."""

    @contextmanager
    def on(self, runner: Any) -> Iterator[None]:
        """Let SGLang's model runner run by this backend and these graphs."""
        before = runner.attn_backend, runner.decode_cuda_graph_runner
        runner.attn_backend, runner.decode_cuda_graph_runner = self.backend, self.graphs
        try:
            yield
        finally:
            runner.attn_backend, runner.decode_cuda_graph_runner = before

    def run(self, runner: Any, forward_batch: Any) -> Any:
        """SGLang's output of one pass over a batch."""
        versions.bind_plan(runner, forward_batch)
        with self.on(runner):
            return runner.forward(forward_batch)


@dataclass(frozen=True)
class Passes:
    """All passes of a server."""

    draft: Pass
    """A decode step whose tokens are drafts."""
    plain: Pass
    """A dense decode step."""
    verify: Mapping[int, Pass]
    """By number of drafts: a dense pass over the token before them and the drafts."""


def backends_of(runner: Any, draft_backend: Any, counts: Sequence[int]) -> Passes:
    """The passes before anything is captured.

    Args:
        runner: SGLang's model runner, whose own backend verifies and decodes densely.
        draft_backend: of draft steps.
        counts: numbers of drafts, increasing; the last is the server's.
    """
    target = runner.attn_backend
    verify = {counts[-1]: Pass(target)}
    for drafts in counts[:-1]:
        # A GPU's backends verify as many tokens as they were built for.
        verify[drafts] = Pass(target if runner.device == "cpu" else _backend_for(runner, target, drafts))
    return Passes(draft=Pass(draft_backend), plain=Pass(target), verify=verify)


def _backend_for(runner: Any, target: Any, drafts: int) -> Any:
    """The target's backend again, for another number of drafts."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.runtime_context import get_spec

    workspace = runner.init_new_workspace
    runner.init_new_workspace = True
    try:
        with get_spec().override(speculative_num_steps=drafts, speculative_num_draft_tokens=drafts + 1):
            backend = ATTENTION_BACKENDS[target.lim.dense_backend](runner)
    finally:
        runner.init_new_workspace = workspace
    add_sparse_decode(backend, target.lim)
    return backend


def capture(runner: Any, passes: Passes) -> tuple[Passes, dict[str, float], dict[str, float]]:
    """The passes with graphs, and what capturing them took: GB and seconds by pass.

    SGLang has captured the verification of the server's number of drafts. Without CUDA graphs nothing is captured.
    """
    if runner.decode_cuda_graph_runner is None:
        return passes, {}, {}
    from sgl_lim.serving.lossless.graphs import DecodeGraph, VerifyGraph

    memory: dict[str, float] = {}
    seconds: dict[str, float] = {}

    def captured(name: str, one: Pass, make: Callable[[], Any]) -> Pass:
        started, free = time.perf_counter(), get_available_gpu_memory(runner.device, runner.gpu_id, empty_cache=False)
        with Pass(one.backend).on(runner):
            graphs = make()
        memory[name] = free - get_available_gpu_memory(runner.device, runner.gpu_id, empty_cache=False)
        seconds[name] = time.perf_counter() - started
        logger.info("sgl-lim: captured %s graphs in %.1f s, %.2f GB", name, seconds[name], memory[name])
        return Pass(one.backend, graphs)

    most = max(passes.verify)
    verify = {most: Pass(passes.verify[most].backend, runner.decode_cuda_graph_runner)}
    for drafts, one in passes.verify.items():
        if drafts != most:
            verify[drafts] = captured(
                f"verify_{drafts}",
                one,
                lambda one=one, drafts=drafts: VerifyGraph(  # type: ignore[misc]
                    runner,
                    attn_backend=one.backend,
                    speculative_num_steps=drafts,
                    speculative_num_draft_tokens=drafts + 1,
                ),
            )
    plain = captured("plain", passes.plain, lambda: DecodeGraph(runner, attn_backend=passes.plain.backend))
    draft = captured("draft", passes.draft, lambda: DecodeGraph(runner, attn_backend=passes.draft.backend))
    return Passes(draft, plain, verify), memory, seconds


def most_rows(runner: Any, passes: Passes) -> int:
    """Largest batch whose verification runs by graphs, or without them has logits of `LOGITS_BYTES` at most."""
    drafts = max(passes.verify)
    graphs = passes.verify[drafts].graphs
    if graphs is not None:
        return int(graphs.max_bs)
    return max(1, LOGITS_BYTES // (4 * runner.model_config.vocab_size * (drafts + 1)))


def synchronize(device: str) -> None:
    """Wait for the device, where there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()
