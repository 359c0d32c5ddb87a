"""What a run cannot say, from its summary: where nothing was sparse, and where answers were cut off."""

from collections.abc import Mapping
from typing import Any


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that keeps a run's answers from saying anything of sparse attention or of quality.

    Args:
        summary: as `summarize` makes it; fields that older summaries lack raise no warning.
    """
    return [*_nothing_sparse(summary), *_cut_off(summary)]


def _nothing_sparse(summary: Mapping[str, Any]) -> list[str]:
    counters, settings = summary.get("attended_counters"), summary.get("settings", {})
    attention = settings.get("attention") or {}
    if counters is None or attention.get("method") == "full":
        return []
    if counters["tokens_attended"] != counters["tokens_dense"] or counters["selections"]:
        return []
    return [
        f"nothing was sparse: no generated token had a context beyond the budget of {attention.get('budget')} tokens, "
        "so these answers say nothing about sparse attention; ask longer problems or raise --max-tokens, or start the "
        "server with a smaller --lim-budget"
    ]


def _cut_off(summary: Mapping[str, Any]) -> list[str]:
    cut, settings = summary.get("samples_cut_off"), summary.get("settings", {})
    if not cut:
        return []
    return [
        f"{cut} of {summary['samples']} generations were cut off at {settings['max_tokens']:,} tokens, and a cut-off "
        "answer says nothing about quality; raise --max-tokens"
    ]
