"""Where SGLang 0.5.17 and 0.5.23 differ for a speculative worker, all in one place."""

from typing import Any

from packaging.version import Version

import lim_patches


def has_draft_pools_of_its_own() -> bool:
    """Whether this release asks a worker which KV pools drafting has; before, it reads the draft runner's."""
    return lim_patches.sglang_version() >= Version("0.5.22")


class SharedRunner:
    """Stands where SGLang 0.5.17 looks for a draft model: the target's own runner drafts.

    `kv_cache_builder.get_draft_kv_pool` reads `draft_worker.draft_runner` of every algorithm but NGRAM. Nothing that is
    counted here is counted for the target again.
    """

    graph_memory_usage: dict[str, float]
    graph_time_usage: dict[str, float]
    weight_load_time = 0.0
    draft_runners: tuple[Any, ...] = ()
    """Runners with weights of their own, which an update of weights would have to reach."""

    def __init__(self, runner: Any) -> None:
        self.draft_runner = runner
        self.graph_memory_usage, self.graph_time_usage = {}, {}


def draft_worker_of(runner: Any) -> SharedRunner | None:
    """What the scheduler finds as the worker's draft worker."""
    return None if has_draft_pools_of_its_own() else SharedRunner(runner)


def draft_steps() -> int:
    """Tokens that a round drafts at most, as resolved; a server argument of 0.5.23 is as the user left it."""
    from sglang.srt.runtime_context import get_spec

    return int(get_spec().speculative_num_steps)


def overlaps() -> bool:
    """Whether the scheduler launches a round ahead of the results that it has looked at, as resolved."""
    from sglang.srt.runtime_context import get_schedule

    return not get_schedule().disable_overlap_schedule


def kv_of(req: Any) -> tuple[int, int]:
    """Tokens of a request whose KV is committed, and tokens for which it has KV slots; both on the host."""
    committed = req.kv_committed_len if hasattr(req, "kv_committed_len") else req.kv.kv_committed_len
    return int(committed), int(req.kv.kv_allocated_len)


def forget_read_done(runner: Any) -> None:
    """Drop the event by which the scheduler may write the request pool again.

    A graph of drafts records it when it has read its rows, but the verification of the same round reads them after.
    Without the event the scheduler waits for the whole round.
    """
    for name in ("war_fastpath_read_done_event", "shared_read_done_event"):
        if hasattr(runner, name):
            setattr(runner, name, None)


def bind_plan(runner: Any, forward_batch: Any) -> None:
    """Tell 0.5.23 that a batch which we built reads the slots that its rows say."""
    translator = getattr(runner, "kv_index_translator", None)
    if translator is not None:
        translator.bind_own_plan(forward_batch)


def tensor_parallel_group() -> Any:
    """SGLang's `GroupCoordinator` of the ranks that decode a batch together."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    return get_attn_tp_group()


def agreed(value: Any) -> Any:
    """The first rank's value, on all ranks that decode a batch together."""
    group = tensor_parallel_group()
    return value if group.world_size == 1 else group.broadcast_object(value, src=0)
