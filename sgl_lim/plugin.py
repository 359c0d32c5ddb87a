"""Plugin entry point: registers the backend, its flags and the hooks in every SGLang process."""

import argparse
from typing import Any


def plug() -> None:
    """Entry point of the group `sglang.srt.plugins`.

    SGLang logs an exception here and goes on; the backend's factory checks that everything arrived.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    import lim_patches
    from lim_patches import (
        cli_flags,
        discarded_results,
        grammar_on_cpu,
        host_cache_on_cpu,
        llguidance_dead_ends,
        lora_on_cpu,
        no_token_left,
        refuse_before_weights,
        requests_out_of_range,
        row_generations,
        row_room,
        rows_on_host,
        server_info,
        slots_on_cpu,
        stops_before_length,
        triton_on_cpu,
    )
    from sgl_lim.serving import arrivals, metrics
    from sgl_lim.serving.lossless import algorithm
    from sgl_lim.settings import flags, refusals

    lim_patches.use(cli_flags, add_flags=flags.add_flags, take_flags=_take_flags)
    lim_patches.use(refuse_before_weights, check=_check_before_weights)
    lim_patches.use(server_info, key=metrics.INFO_KEY, describe=metrics.describe, on_idle=metrics.on_idle)
    lim_patches.use(discarded_results, on_discarded=metrics.on_discarded)
    lim_patches.use(rows_on_host, on_batch=arrivals.note_batch)
    for seam in (row_generations, row_room, stops_before_length, no_token_left, requests_out_of_range):
        lim_patches.use(seam)
    for seam in (grammar_on_cpu, host_cache_on_cpu, llguidance_dead_ends, lora_on_cpu, slots_on_cpu, triton_on_cpu):
        lim_patches.use(seam)
    algorithm.register()
    # Last: were a hook to raise above, the backend's name would be unknown rather than half served.
    add_attention_backend_choices([refusals.BACKEND])
    register_attention_backend(refusals.BACKEND)(_make)


def _make(runner: Any) -> Any:
    from sgl_lim.serving.backend import make

    return make(runner)


def _take_flags(args: argparse.Namespace) -> None:
    from sgl_lim.settings import flags, refusals

    refusals.warn_if_unused(flags.take_flags(args), args)


def _check_before_weights(model_runner: Any) -> None:
    from sgl_lim.settings import refusals
    from sgl_lim.settings.flags import load

    if refusals.names_us(model_runner.server_args) and not model_runner.is_draft_worker:
        refusals.check_before_weights(load(), model_runner)
