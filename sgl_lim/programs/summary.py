"""What a run's rows add up to, as a dictionary for machines and a table for people."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sgl_lim.programs.intervals import clustered_interval, standard_error, wilson_interval
from sgl_lim.programs.run_records import Measurement, Row, Sample
from sgl_lim.programs.run_warnings import warnings_of
from sgl_lim.programs.runner import Invocation
from sgl_lim.programs.server_stats import ServerState, drafted, total_fraction


def summarize(
    rows: Sequence[Row],
    *,
    problems: int,
    settings: Mapping[str, Any],
    server: ServerState,
    invocation: Invocation,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """Summarize the last row of each asked problem.

    Accuracy and lengths are over all rows without an error; speed and `attended_fraction`, the share of dense decode's
    KV that was read, are over `measurements`. `warnings` say what these answers cannot tell.
    `accuracy` is pass@1, the mean over samples, but for self-consistency, whose answer is the vote.

    Args:
        rows: one a problem, at most `problems`.
        problems: how many were to be asked.
        settings: the run's, as in the rows.
        server: the one that was asked.
        invocation: what this process did.
        measurements: of the invocations that the run took so far, this one included.

    Returns:
        Builtins only. Rates without anything to count are None.
    """
    graded = [row for row in rows if row.error is None]
    samples = [sample for row in graded for sample in row.samples]
    summary = {
        "server": server.describe(),
        "settings": dict(settings),
        "problems": problems,
        "answered": len(graded),
        "errors": len(rows) - len(graded),
        **_accuracies(graded, settings),
        **_chain_rates(samples),
        "generation_tokens": _lengths(graded, samples),
        "other_branch_tokens": sum(sample.other_tokens for sample in samples),
        "samples": len(samples),
        "samples_cut_off": sum(sample.finish_reason == "length" for sample in samples),
        "forcing": _forcing(samples),
        "prefix_cache_hit_share": _rate(
            sum(sample.cached_tokens for sample in samples), sum(sample.prompt_tokens for sample in samples)
        ),
        "invocation": asdict(invocation),
        **_measured(samples, measurements),
    }
    return {**summary, "warnings": warnings_of(summary)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of a name and a value, aligned."""
    lengths, settings, forcing = summary["generation_tokens"], summary["settings"], summary["forcing"]
    measured = summary["measured"]
    lines = [
        ("server", summary["server"]),
        ("problems", f"{summary['answered']} of {summary['problems']} answered, {summary['errors']} errors"),
        ("pass@1" if summary["majority"] else "accuracy", _accuracy(summary["pass_at_1"], summary)),
    ]
    if summary["majority"]:
        lines.append((f"maj@{settings['samples']}", _accuracy(summary["majority"], summary)))
    if summary["word_accuracy"] is not None:
        lines.append(("whole chains", f"{summary['whole_chain_accuracy']:.3f}{_at(lengths)}"))
        lines.append(("word accuracy", f"{summary['word_accuracy']:.4f}{_at(lengths)}"))
    if forcing is not None:
        lines.append(
            (
                "thinking",
                f"mean {forcing['mean_thinking_tokens']:,.1f} tokens, {forcing['mean_waits']:.2f} ends dropped; "
                f"{forcing['forced']} of {summary['samples']} cut",
            )
        )
    if summary["other_branch_tokens"]:
        lines.append(("on other branches", f"{summary['other_branch_tokens']:,} tokens"))
    if summary["drafted"] is not None:
        lines.append(("drafts accepted", _drafted(summary["drafted"])))
    lines += [
        (
            "generation tokens",
            f"{mean_length(lengths)}, median {number(lengths['median'], ',.1f')}, max "
            f"{number(lengths['max'], ',')}; {summary['samples_cut_off']} of {summary['samples']} cut off at "
            f"{settings['max_tokens']:,}",
        ),
        (
            "output tokens/s",
            f"{number(summary['output_tokens_per_second'], ',.1f')}  ({measured['output_tokens']:,} tokens of "
            f"{measured['items']} problems in {measured['seconds']:.1f} s, {measured['invocations']} invocations)",
        ),
        ("share of KV read", f"{number(summary['attended_fraction'], '.3f')}  ({summary['attended_note']})"),
        ("attended tokens", f"{number(summary['attended_tokens'], ',.1f')}  (a generated token and layer)"),
        ("graded by", settings.get("grader") or "an earlier version, which did not say"),
        ("prefix-cache hits", f"{number(summary['prefix_cache_hit_share'], '.3f')}  (of prompt tokens)"),
        *(("warning", text) for text in summary["warnings"]),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _drafted(drafts: Mapping[str, Any]) -> str:
    share = f"{drafts['acceptance']:.3f} of {drafts['drafts']:,}"
    return f"{share}, {drafts['tokens_a_verification']:.2f} tokens a verification"


def mean_length(lengths: Mapping[str, Any]) -> str:
    """`mean 1,234.5 ± 67.8`: with its standard error, where there is one."""
    error = lengths.get("standard_error")
    return f"mean {number(lengths['mean'], ',.1f')}" + ("" if error is None else f" ± {error:,.1f}")


def number(value: float | None, form: str) -> str:
    """A value for people; "-" for none."""
    return "-" if value is None else format(value, form)


def _accuracies(graded: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of samples and of votes, and which of them is the program's."""
    single, voted = _pass_at_1(graded, settings), _majority(graded, settings)
    votes_count = voted is not None and settings.get("program") == "self_consistency"
    headline = voted if votes_count and voted is not None else single
    return {
        "accuracy": headline["accuracy"],
        "accuracy_interval": headline["interval"],
        "accuracy_of": f"maj@{settings['samples']}" if votes_count else "pass@1",
        "correct": headline["correct"],
        "pass_at_1": single,
        "majority": voted,
    }


def _pass_at_1(graded: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Mean over samples; its interval holds samples of one item for dependent."""
    rates = [row.sample_accuracy for row in graded]
    return {
        "accuracy": statistics.fmean(rates) if rates else None,
        "interval": clustered_interval(rates, settings["samples"] or 1),
        "correct": sum(sample.correct for row in graded for sample in row.samples),
        "of": sum(len(row.samples) for row in graded),
    }


def _majority(graded: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The votes, of a program that has samples."""
    if settings["samples"] is None:
        return None
    correct = sum(row.correct for row in graded)
    rate = _rate(correct, len(graded))
    interval = None if rate is None else wilson_interval(rate, len(graded))
    return {"accuracy": rate, "interval": interval, "correct": correct, "of": len(graded)}


def _lengths(graded: Sequence[Row], samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [sample.completion_tokens for sample in samples]
    return {
        "mean": statistics.fmean(lengths) if lengths else None,
        "standard_error": standard_error([row.mean_tokens for row in graded]),
        "median": statistics.median(lengths) if lengths else None,
        "max": max(lengths, default=None),
        "total": sum(lengths),
    }


def _forcing(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What budget forcing did; None of other programs."""
    forced = [sample for sample in samples if sample.waits is not None]
    if not forced:
        return None
    return {
        "mean_thinking_tokens": statistics.fmean(sample.thinking_tokens or 0 for sample in forced),
        "mean_waits": statistics.fmean(sample.waits or 0 for sample in forced),
        "forced": sum(bool(sample.forced) for sample in forced),
    }


def _measured(samples: Sequence[Sample], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Speed and attended tokens, over all invocations that said so."""
    attended = total_fraction(measurements)
    tokens, seconds = sum(part.output_tokens for part in measurements), sum(part.seconds for part in measurements)
    reads = [sample.context_tokens for sample in samples]
    generated = sum(sample.completion_tokens + sample.other_tokens for sample in samples)
    known = sum(read for read in reads if read is not None) if None not in reads else None
    mean_context = None if known is None else _rate(known, generated)
    return {
        "output_tokens_per_second": _rate(tokens, seconds),
        "measured": {
            "invocations": len(measurements),
            "items": sum(part.items for part in measurements),
            "output_tokens": tokens,
            "seconds": seconds,
        },
        "attended_fraction": attended.value,
        "attended_note": attended.note,
        "attended_counters": None if attended.delta is None else asdict(attended.delta),
        "drafted": None if attended.delta is None else drafted(asdict(attended.delta)),
        "context_tokens": mean_context,
        "attended_tokens": None if attended.value is None or mean_context is None else attended.value * mean_context,
    }


def _chain_rates(samples: Sequence[Sample]) -> dict[str, float | None]:
    chains = [sample for sample in samples if sample.words_total]
    return {
        "whole_chain_accuracy": _rate(sum(bool(sample.whole_chain) for sample in chains), len(chains)),
        "word_accuracy": _rate(
            sum(sample.words_matching or 0 for sample in chains), sum(sample.words_total or 0 for sample in chains)
        ),
    }


def _accuracy(figure: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if figure["accuracy"] is None:
        return "-"
    low, high = figure["interval"]
    rate = f"{figure['accuracy']:.3f}  (95%: {low:.3f} to {high:.3f})  {figure['correct']} of {figure['of']}"
    return rate + _at(summary["generation_tokens"])


def _at(lengths: Mapping[str, Any]) -> str:
    return f", {mean_length(lengths)} tokens"


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None
