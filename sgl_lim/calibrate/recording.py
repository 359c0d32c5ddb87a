"""A recording over a real engine: prompts are continued greedily, and the engine's backend measures."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_lim.settings.config import ENV
from sgl_lim.settings.flags import read_environment


class RecordingError(RuntimeError):
    """The engine did not record what it should have."""


@dataclass(frozen=True)
class Recording:
    """What an engine measured."""

    recall: dict[int, list[list[float]]]
    """By budget that some context exceeded: [layers][layers], `[i][j]` the mean share of layer j's attention that the
    set of layer i covers, i <= j."""
    rows: dict[int, int]
    """By budget, none left out: decoded tokens with a longer context."""
    generated: int
    """Tokens, over all prompts."""


def ask_to_record(budgets: Sequence[int]) -> None:
    """Tell the engines that this process starts from now on to record; flags and the variable's other keys stay."""
    decided_here = ("budget", "selection_layers", "preset")
    kept = {name: value for name, value in read_environment().items() if name not in decided_here}
    os.environ[ENV] = json.dumps({**kept, "record_budgets": list(budgets)})


def record(
    server_args: Any,
    prompts: Sequence[Sequence[int]],
    *,
    budgets: Sequence[int],
    max_tokens: int,
    concurrency: int,
    progress: Callable[[int], None],
) -> Recording:
    """Start an engine, continue all prompts, and fetch what it measured.

    Prompts run in batches of `concurrency`, one batch after the other, so that equal commands have equal batches.

    Args:
        server_args: SGLang's, with our backend, without decode graphs and overlap; `ask_to_record` was called.
        prompts: token ids.
        progress: is called with the number of prompts done.

    Raises:
        RecordingError: the engine measured another number of tokens than it decoded.
    """
    import sglang

    engine = sglang.Engine(server_args=server_args)
    try:
        lengths, retracted = [], 0
        sampling = {"temperature": 0, "max_new_tokens": max_tokens}
        for first in range(0, len(prompts), concurrency):
            batch = [list(prompt) for prompt in prompts[first : first + concurrency]]
            for answer in engine.generate(input_ids=batch, sampling_params=sampling):
                meta = answer["meta_info"]
                lengths.append((meta["prompt_tokens"], meta["completion_tokens"]))
                retracted += meta.get("num_retractions", 0)
            progress(len(lengths))
        info = engine.get_server_info()
    finally:
        engine.shutdown()
    return _checked(info["internal_states"][0]["lessismore"]["recording"], budgets, lengths, retracted)


def _checked(
    measured: Mapping[str, Any], budgets: Sequence[int], lengths: Sequence[tuple[int, int]], retracted: int
) -> Recording:
    """What the engine's recorder measured, if it is of these budgets and of as many tokens as were decoded.

    Args:
        measured: as `Recorder.read` gives it.
        lengths: tokens of prompt and of completion of each request; retracted: how often one was.
    """
    rows = dict(zip(measured["budgets"], measured["rows"], strict=True))
    if list(rows) != list(budgets):
        raise RecordingError(f"the engine recorded the budgets {list(rows)}, not {list(budgets)}")
    for budget, count in rows.items():
        wanted = decoded_beyond(lengths, budget)
        # A retracted request computes one more token by a prefill each time that it resumes.
        if not wanted - retracted <= count <= wanted:
            raise RecordingError(f"at budget {budget} {count} tokens were recorded, but {wanted} decoded")
    recall = {
        budget: [[share / rows[budget] for share in row] for row in sums]
        for budget, sums in zip(measured["budgets"], measured["sums"], strict=True)
        if rows[budget]
    }
    return Recording(recall, rows, sum(completion for _, completion in lengths))


def decoded_beyond(lengths: Sequence[tuple[int, int]], budget: int) -> int:
    """How many decode steps of requests have a context longer than `budget`.

    The first token of a completion comes from the prefill; the step that makes the next one attends to it as well.

    Args:
        lengths: tokens of prompt and of completion of each request.
    """
    return sum(
        max(0, min(completion - 1, prompt + completion - 1 - budget)) for prompt, completion in lengths if completion
    )
