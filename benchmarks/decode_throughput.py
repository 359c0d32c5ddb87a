"""Decode tokens/s of running servers at a fixed batch and context, prefill excluded, first server the baseline.

Prompts of random tokens are sent together and their tokens streamed; what counts are the tokens between the moment
when the last request has its first token and the moment when the first request ends: all requests decode, and no
prefill runs. Before any time is taken, each server solves chain problems greedily and its answers are compared with
the baseline's.

    python -m benchmarks.decode_throughput torch_native=http://127.0.0.1:30000 lessismore=http://127.0.0.1:30001

`--server NAME=ARGUMENTS`, as often as wanted, starts servers instead, all before the first is measured.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_line
from benchmarks.results_file import append_rows
from benchmarks.targets import add_target_flags, chosen_targets, endpoint, log_folder
from sgl_lim import command
from sgl_lim.programs.argument_types import integer
from sgl_lim.programs.endpoint import EndpointError, asked, request_json
from sgl_lim.programs.server_process import ServerFailed
from sgl_lim.tasks.chains import MAX_STEPS, NUM_NODES, generate_chains, parse_answer


def post(url: str, **body: Any) -> Any:
    """POST `/generate`."""
    return request_json(f"{url}/generate", body, timeout=1800)


def greedy(tokens: int, **more: Any) -> dict[str, Any]:
    """Sampling parameters for `tokens` new tokens."""
    return {"max_new_tokens": tokens, "temperature": 0, **more}


def solve_chains(url: str, count: int, facts: int, steps: int) -> list[str | None]:
    """Final answers of `count` chain problems."""
    problems = list(generate_chains(count, num_facts=facts, num_steps=steps, seed=7))
    answers = post(url, text=[p.prompt for p in problems], sampling_params=greedy(8 * steps + 8))
    return [parse_answer(a["text"]) for a in answers]


def stream(url: str, prompt: list[int], new_tokens: int) -> list[tuple[float, int]]:
    """When (seconds, monotonic) and how many tokens one streamed generation had, chunk by chunk."""
    body = {"input_ids": prompt, "sampling_params": greedy(new_tokens, ignore_eos=True), "stream": True}
    chunks = []
    with asked(f"{url}/generate", body, timeout=1800, stream=True) as answer:
        for line in answer.iter_lines(chunk_size=1 << 16):
            if line.startswith(b"data: {"):
                meta = json.loads(line[len(b"data: ") :])["meta_info"]
                chunks.append((time.monotonic(), int(meta["completion_tokens"])))
    return chunks


def tokens_per_second(url: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Output tokens a second while the whole batch decodes."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        runs = list(clients.map(lambda prompt: stream(url, prompt, new_tokens), prompts))
    begin = max(run[0][0] for run in runs)
    end = min(run[-1][0] for run in runs)
    # A chunk's tokens were decoded since the chunk before it.
    produced = sum(
        tokens - before for run in runs for (_, before), (at, tokens) in itertools.pairwise(run) if begin < at <= end
    )
    if produced < len(prompts) * new_tokens / 2:
        raise RuntimeError(f"{url}: only {produced} tokens while all requests decoded; raise --new-tokens or the pool")
    return produced / (end - begin)


def main() -> None:
    """Measure every server and print rows; `--output` appends them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_flags(parser)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--context", type=int, default=3600, help="prompt tokens a request")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=512, help="token ids are drawn below this")
    parser.add_argument("--chains", type=int, default=4, help="chain problems to check before timing (0: no check)")
    parser.add_argument("--facts", type=integer(2, NUM_NODES), default=330)
    parser.add_argument("--steps", type=integer(1, MAX_STEPS), default=24)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    targets, logs = chosen_targets(parser, args), log_folder(args)
    try:
        with ExitStack() as stack:
            started = {one.name: stack.enter_context(endpoint(one, logs, args.start_timeout)) for one in targets}
            rows = measure(args, started)
    except (EndpointError, ServerFailed) as error:
        raise SystemExit(f"error: {error}") from None
    if args.output:
        append_rows(args.output, list(rows[0]), rows)


def measure(args: argparse.Namespace, servers: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each server of `servers`, URLs by name."""
    draw = random.Random(0)
    prompts = [[draw.randrange(12, args.vocabulary) for _ in range(args.context)] for _ in range(args.requests)]
    baseline_answers: list[str | None] = []
    rows: list[dict[str, Any]] = []
    for name, url in servers.items():
        answers = solve_chains(url, args.chains, args.facts, args.steps) if args.chains else []
        baseline_answers = baseline_answers or answers
        agreeing = sum(a == b for a, b in zip(answers, baseline_answers, strict=True))
        for prompt in prompts:  # the radix cache then holds them, and repeats begin alike
            post(url, input_ids=[prompt], sampling_params=greedy(1))
        speeds = sorted(tokens_per_second(url, prompts, args.new_tokens) for _ in range(args.repeats))
        median = statistics.median(speeds)
        rows.append(
            {
                "server": name,
                "requests": args.requests,
                "context": args.context,
                "new_tokens": args.new_tokens,
                "tokens_per_s": round(median, 2),
                "lowest": round(speeds[0], 2),
                "highest": round(speeds[-1], 2),
                "ratio": round(median / rows[0]["tokens_per_s"], 2) if rows else 1.0,
                "same_answers": f"{agreeing}/{args.chains}",
                "machine": machine_line(),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


if __name__ == "__main__":
    command.run(main)
