"""What a run's rows add up to, as a dictionary for machines and a table for people."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sgl_lim.programs.records import Row, Sample
from sgl_lim.programs.runner import Invocation
from sgl_lim.programs.server_stats import AttendedFraction, ServerState

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson_interval(successes: int, trials: int) -> tuple[float, float] | None:
    """The 95% Wilson score interval of a proportion; None without trials."""
    if trials == 0:
        return None
    rate, z2 = successes / trials, _Z95 * _Z95
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(
    rows: Sequence[Row],
    *,
    problems: int,
    settings: Mapping[str, Any],
    server: ServerState,
    invocation: Invocation,
    attended: AttendedFraction,
) -> dict[str, Any]:
    """Summarize the last row of each asked problem.

    Accuracy and lengths are over all rows without an error; speed and attended fraction are this invocation's.

    Args:
        rows: one a problem, at most `problems`.
        problems: how many were to be asked.
        settings: the run's, as in the rows.
        server: its state after the run.
        invocation: what this process did.
        attended: between the server's states before and after.

    Returns:
        Builtins only. Rates without anything to count are None.
    """
    graded = [row for row in rows if row.error is None]
    samples = [sample for row in graded for sample in row.samples]
    correct = sum(row.correct for row in graded)
    lengths = [sample.completion_tokens for sample in samples]
    return {
        "server": server.describe(),
        "settings": dict(settings),
        "problems": problems,
        "answered": len(graded),
        "errors": len(rows) - len(graded),
        "accuracy": _rate(correct, len(graded)),
        "accuracy_interval": wilson_interval(correct, len(graded)),
        "correct": correct,
        "mean_sample_accuracy": _rate(sum(sample.correct for sample in samples), len(samples)),
        **_chain_rates(samples),
        "generation_tokens": {
            "mean": statistics.fmean(lengths) if lengths else None,
            "median": statistics.median(lengths) if lengths else None,
            "max": max(lengths, default=None),
            "total": sum(lengths),
        },
        "other_branch_tokens": sum(sample.other_tokens for sample in samples),
        "samples": len(samples),
        "samples_cut_off": sum(sample.finish_reason == "length" for sample in samples),
        "prefix_cache_hit_share": _rate(
            sum(sample.cached_tokens for sample in samples), sum(sample.prompt_tokens for sample in samples)
        ),
        "output_tokens_per_second": _rate(invocation.output_tokens, invocation.seconds),
        "invocation": asdict(invocation),
        "attended_fraction": attended.value,
        "attended_note": attended.note,
        "attended_counters": None if attended.delta is None else asdict(attended.delta),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of a name and a value, aligned."""
    lengths, invocation, settings = summary["generation_tokens"], summary["invocation"], summary["settings"]
    samples = settings["samples"]
    interval = summary["accuracy_interval"]
    lines = [
        ("server", summary["server"]),
        ("problems", f"{summary['answered']} of {summary['problems']} answered, {summary['errors']} errors"),
        (
            "accuracy" if samples is None else f"accuracy maj@{samples}",
            "-"
            if interval is None
            else f"{summary['accuracy']:.3f}  (95%: {interval[0]:.3f} to {interval[1]:.3f})  "
            f"{summary['correct']} of {summary['answered']}",
        ),
    ]
    if samples is not None:
        lines.append(("mean pass@1", _number(summary["mean_sample_accuracy"], ".3f")))
    if summary["word_accuracy"] is not None:
        lines.append(("whole chains", f"{summary['whole_chain_accuracy']:.3f}"))
        lines.append(("word accuracy", f"{summary['word_accuracy']:.4f}"))
    if summary["other_branch_tokens"]:
        lines.append(("on other branches", f"{summary['other_branch_tokens']:,} tokens"))
    lines += [
        (
            "generation tokens",
            f"mean {_number(lengths['mean'], ',.1f')}, median {_number(lengths['median'], ',.1f')}, max "
            f"{_number(lengths['max'], ',')}; {summary['samples_cut_off']} of {summary['samples']} cut off at "
            f"{settings['max_tokens']:,}",
        ),
        (
            "output tokens/s",
            f"{_number(summary['output_tokens_per_second'], ',.1f')}  ({invocation['output_tokens']:,} tokens of "
            f"{invocation['items']} problems in {invocation['seconds']:.1f} s, this invocation)",
        ),
        ("attended fraction", f"{_number(summary['attended_fraction'], '.3f')}  ({summary['attended_note']})"),
        ("prefix-cache hits", f"{_number(summary['prefix_cache_hit_share'], '.3f')}  (of prompt tokens)"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _chain_rates(samples: Sequence[Sample]) -> dict[str, float | None]:
    chains = [sample for sample in samples if sample.words_total]
    return {
        "whole_chain_accuracy": _rate(sum(bool(sample.whole_chain) for sample in chains), len(chains)),
        "word_accuracy": _rate(
            sum(sample.words_matching or 0 for sample in chains), sum(sample.words_total or 0 for sample in chains)
        ),
    }


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
