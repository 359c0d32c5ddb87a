"""Summaries side by side: `python -m sgl_lim.programs.compare NAME=SUMMARY.json NAME=SUMMARY.json …`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_lim import command
from sgl_lim.programs.run_warnings import warnings_of
from sgl_lim.programs.summary import mean_length, number


def columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a reader compares, by heading. Values a run did not have are "-"."""
    return {
        "accuracy [95%]": rate(summary["accuracy"], summary["accuracy_interval"]),
        "majority [95%]": majority(summary),
        "whole chains": number(summary["whole_chain_accuracy"], ".1%"),
        "words right": number(summary["word_accuracy"], ".2%"),
        "mean length": mean_length(summary["generation_tokens"]).removeprefix("mean "),
        "tokens/s": number(summary["output_tokens_per_second"], ".1f"),
        "KV read": number(summary["attended_fraction"], ".1%"),
        "prefix-cache hits": number(summary["prefix_cache_hit_share"], ".1%"),
    }


def rate(value: float | None, interval: Sequence[float] | None) -> str:
    """`75.0% [50.0%, 90.0%]`."""
    return "-" if value is None or interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def majority(summary: Mapping[str, Any]) -> str:
    """The votes' accuracy; "-" of runs with one sample, and of summaries from before there was one."""
    voted = summary.get("majority")
    return "-" if voted is None else rate(voted["accuracy"], voted["interval"])


def comparison(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of one row a summary, aligned, and below it what the runs cannot say."""
    rows = {name: columns(summary) for name, summary in summaries.items()}
    headings = ["", *next(iter(rows.values()))]
    cells = [headings, *([name, *row.values()] for name, row in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    warned = [f"{name}: warning: {text}" for name, summary in summaries.items() for text in warnings_of(summary)]
    return "\n".join([*lines, *warned, *_graders(summaries)])


def _graders(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning, if accuracies are not of one grader; summaries from before it was named may be of any."""
    graders = {name: summary.get("settings", {}).get("grader") for name, summary in summaries.items()}
    if len(set(graders.values())) == 1:
        return []
    listed = ", ".join(f"{name} by {grader or 'one that is not named'}" for name, grader in graders.items())
    return [f"warning: accuracies of different graders cannot be compared: {listed}; run the older ones again"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of the summaries named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m sgl_lim.programs.compare", description=__doc__)
    parser.add_argument("summaries", nargs="+", metavar="NAME=FILE", help="a summary that --summary wrote")
    args = parser.parse_args(argv)
    summaries = {}
    for item in args.summaries:
        name, _, path = item.rpartition("=")
        name = name or Path(path).stem
        if name in summaries:
            parser.error(f"argument NAME=FILE: {name} is taken; every summary needs a name of its own")
        try:
            summaries[name] = json.loads(Path(path).read_text())
            columns(summaries[name])
        except (OSError, ValueError) as error:
            parser.error(f"argument NAME=FILE: {path} is no summary: {error}")
        except (KeyError, TypeError, AttributeError) as error:
            parser.error(f"argument NAME=FILE: {path} is JSON, but no summary that --summary wrote ({error!r})")
    print(comparison(summaries))


if __name__ == "__main__":
    command.run(main)
