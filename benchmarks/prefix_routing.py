"""Replicas behind SGLang's router: what does it give that requests with a common prefix meet on one server?

    python -m benchmarks.prefix_routing --prefixes 8 --branches 8 --prefix-len 16384 --gpus-each 1 -- \\
        --model-path /dev/shm/qwen3-8b --attention-backend lessismore

What follows `--` are the arguments of every server. The servers start once; each policy gets a router of its own over
them, and empty caches. `--branches` requests begin with the same `--prefix-len` tokens, all requests come in one random
order, the same for every policy, from `--concurrency` clients that each wait for their answer. `cached` is the share of
all prompt tokens that was in a server's cache. `tokens_per_s` counts generated tokens, prefills included in the time.
`same_answers` is the share of greedy answers that are the first policy's: prefills in other chunks round otherwise.
"""

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from benchmarks.closed_loop import random_prompts
from benchmarks.load_spec import positive
from benchmarks.machine import machine_line_apart
from benchmarks.results_file import append_rows, markdown, ratio, require_columns
from benchmarks.targets import flush_cache, log_folder
from sgl_lim import command
from sgl_lim.programs import api_key
from sgl_lim.programs.endpoint import EndpointError, server_info
from sgl_lim.programs.replicas import POLICIES, RouterLaunch, replica_launches, running_router
from sgl_lim.programs.server_process import ServerFailed, claim_port, launch_command, running_servers

Row = dict[str, Any]
COLUMNS = (
    *("server", "replicas", "policy", "prefixes", "branches", "prefix_len", "tail_len", "output_len", "concurrency"),
    *("seconds", "tokens_per_s", "ratio", "cached", "tokens_shared", "rows_grouped", "requests_by_server"),
    *("same_answers", "machine", "command"),
)
TOKENS = 12, 512  # ids that any vocabulary has


@dataclass(frozen=True)
class Reply:
    """One answer."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every policy; the exit status is 1 if one has no row."""
    args = parse_arguments(argv)
    if args.output:
        require_columns(args.output, COLUMNS)
    machine, logs = machine_line_apart(), log_folder(args)
    launches = replica_launches(args.arguments, args.replicas, logs, gpus_each=args.gpus_each)
    named = {"server": args.name, "machine": machine, "command": launch_command(launches[0].arguments)}
    rows: list[Row] = []
    try:
        with running_servers(launches, timeout=args.start_timeout) as servers:
            for row in measure_policies([server.url for server in servers], args, logs):
                rows.append({name: {**named, **row}[name] for name in COLUMNS})
                print(json.dumps(rows[-1]), file=sys.stderr)
                if args.output:
                    append_rows(args.output, COLUMNS, rows[-1:])
    except (ServerFailed, EndpointError, requests.RequestException) as error:
        print(f"error: {error}", file=sys.stderr)
    if rows:
        print(markdown(rows, COLUMNS))
    return int(len(rows) < len(args.policies))


def measure_policies(workers: Sequence[str], args: argparse.Namespace, logs: Path) -> Iterator[Row]:
    """A row for each policy, over servers that run."""
    prompts = shuffled_prompts(args)
    shape = {name: getattr(args, name) for name in COLUMNS if hasattr(args, name)}
    warm_up(workers, prompts, args.output_len)
    base: Row | None = None
    for policy in args.policies:
        for worker in workers:
            flush_cache(worker)
        before = counters(workers)
        launch = RouterLaunch(workers, policy, logs / f"router-{policy}.log", claim_port(), shlex.split(args.router))
        with running_router(launch) as url:
            began = time.monotonic()
            replies = ask_all(url, prompts, args.output_len, args.concurrency)
            seconds = time.monotonic() - began
        speed = len(prompts) * args.output_len / seconds
        base = base or {"replies": replies, "speed": speed}
        yield {
            **shape,
            "policy": policy,
            "seconds": round(seconds, 2),
            "tokens_per_s": round(speed, 2),
            "ratio": ratio(speed, base["speed"]),
            "cached": round(sum(r.cached_tokens for r in replies) / sum(r.prompt_tokens for r in replies), 4),
            **counted(before, counters(workers)),
            "same_answers": round(agreement(replies, base["replies"]), 4),
        }


def counted(before: Sequence[Mapping[str, int]], after: Sequence[Mapping[str, int]]) -> Row:
    """The columns of our counters, over all servers; blank for dense ones."""
    grown = [{name: late[name] - early[name] for name in early} for early, late in zip(before, after, strict=True)]
    sums = {name: sum(one[name] for one in grown) if all(grown) else "" for name in ("tokens_shared", "rows_grouped")}
    return {**sums, "requests_by_server": "/".join(str(one.get("requests", "")) for one in grown)}


def agreement(replies: Sequence[Reply], others: Sequence[Reply]) -> float:
    """Share of the answers that are the same."""
    return sum(a.tokens == b.tokens for a, b in zip(replies, others, strict=True)) / len(replies)


def shuffled_prompts(args: argparse.Namespace) -> list[list[int]]:
    """All prompts in the order in which they are sent."""
    prefixes = random_prompts(args.prefixes, args.prefix_len, TOKENS, args.seed)
    tails = random_prompts(args.prefixes * args.branches, args.tail_len, TOKENS, args.seed + 1)
    prompts = [prefixes[number % args.prefixes] + tail for number, tail in enumerate(tails)]
    random.Random(args.seed).shuffle(prompts)
    return prompts


def warm_up(workers: Sequence[str], prompts: Sequence[Sequence[int]], output_len: int) -> None:
    """Kernels compile at a server's first long request."""
    for worker in workers:
        ask(worker, prompts[0], min(16, output_len))


def ask_all(url: str, prompts: Sequence[Sequence[int]], output_len: int, clients: int) -> list[Reply]:
    """Greedy answers by so many clients at once."""
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda prompt: ask(url, prompt, output_len), prompts))


def ask(url: str, prompt: Sequence[int], output_len: int) -> Reply:
    """One greedy answer of exactly `output_len` tokens.

    Raises:
        EndpointError: it was refused, or is of another length.
    """
    sampling = {"max_new_tokens": output_len, "temperature": 0, "ignore_eos": True}
    body: Row = {"input_ids": list(prompt), "sampling_params": sampling}
    answer = requests.post(f"{url}/generate", json=body, headers=api_key.headers(None), timeout=3600)
    if not answer.ok:
        raise EndpointError(f"{url}: HTTP {answer.status_code}: {answer.text[:500]}")
    data = answer.json()
    if len(data["output_ids"]) != output_len:
        raise EndpointError(f"{url}: a request ended after {len(data['output_ids'])} of {output_len} tokens")
    return Reply(tuple(data["output_ids"]), data["meta_info"]["prompt_tokens"], data["meta_info"]["cached_tokens"])


def counters(workers: Sequence[str]) -> list[Mapping[str, int]]:
    """Our counters of each server; {} of a dense one."""
    states = [server_info(worker)["internal_states"][0] for worker in workers]
    return [state.get("lessismore", {}).get("counters", {}) for state in states]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", default="lessismore", help="of the servers, in the rows (default: %(default)s)")
    add("--replicas", type=positive, default=2)
    add("--gpus-each", type=int, default=0, help="GPUs of each server; 0 on a CPU, or for all on the first GPU")
    add("--policies", nargs="+", choices=POLICIES, default=["round_robin", "cache_aware"], help="the first is the base")
    add("--router", default="", metavar="ARGUMENTS", help="further arguments of the router")
    add("--prefixes", type=positive, default=8)
    add("--branches", type=positive, default=8, help="requests of each prefix")
    add("--prefix-len", type=positive, default=16384)
    add("--tail-len", type=positive, default=64, help="tokens of each prompt that no other has")
    add("--output-len", type=positive, default=512)
    add("--concurrency", type=positive, default=32, help="requests at once")
    add("--seed", type=int, default=0)
    add("--logs", type=Path, help="folder of the logs (default: a new temporary one)")
    add("--start-timeout", type=float, default=900, metavar="S")
    add("--output", type=Path, help="CSV file that grows by a row for each policy")
    add("arguments", nargs="+", help="of every server, behind `--`")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(main)
