"""Are a lossless server's greedy answers those of a dense one, and how much faster do they come?

    python -m benchmarks.lossless_answers --dense http://127.0.0.1:30000 --lossless http://127.0.0.1:30001

Both servers, of the same model, get the same prompts twice; the second time counts. Where two answers part, the dense
server says what log-probabilities it gives both tokens after the same text. Within `--tie` they are equal but for
rounding, and whoever rounds otherwise answers otherwise. One that parts by more ends the command with 1.

Prompts are chains of facts (`sgl_lim.tasks.chains`). Any model can continue them; the chain tracer solves them.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from sgl_lim import command
from sgl_lim.programs.argument_types import integer
from sgl_lim.tasks.chains import NUM_NODES, generate_chains

TIMEOUT_S = 600


@dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def main(argv: Sequence[str]) -> int:
    """Compare. Returns 1 if an answer parts from the dense one at what is no tie."""
    args = build_parser().parse_args(argv)
    texts = [
        problem.prompt for problem in generate_chains(args.prompts, num_facts=args.facts, num_steps=24, seed=args.seed)
    ]
    prompts = [requests.post(f"{args.dense}/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    prompts = [prompt[: args.most_prompt_tokens] for prompt in prompts]
    seconds: dict[str, float] = {}
    answers: dict[str, list[Answer]] = {}
    for url in (args.dense, args.lossless):
        ask_all(url, prompts, args.at_once, args.tokens)
        started = time.perf_counter()
        answers[url] = ask_all(url, prompts, args.at_once, args.tokens)
        seconds[url] = time.perf_counter() - started
    gaps = [gap_of(args.dense, *pair) for pair in zip(answers[args.dense], answers[args.lossless], strict=True)]
    parted = [gap for gap in gaps if gap is not None]
    told = {
        "answers": len(prompts),
        "the_same": gaps.count(None),
        "widest_tie": max(parted, default=0.0),
        "dense_tokens_per_s": round(len(prompts) * args.tokens / seconds[args.dense], 1),
        "lossless_tokens_per_s": round(len(prompts) * args.tokens / seconds[args.lossless], 1),
        "ratio": round(seconds[args.dense] / seconds[args.lossless], 3),
        "mean_prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "counters": counters_of(args.lossless),
    }
    print(json.dumps(told, indent=2))
    return int(max(parted, default=0.0) > args.tie)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lossless_answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dense", required=True, metavar="URL", help="a server whose decode is dense")
    add("--lossless", required=True, metavar="URL", help="a server of the same model with LESSISMORE")
    add("--prompts", type=int, default=16, metavar="N", help="prompts (default 16)")
    add(
        "--facts",
        type=integer(2, NUM_NODES),
        default=300,
        metavar="N",
        help="facts in a prompt, about 9 words each (default 300)",
    )
    add("--most-prompt-tokens", type=int, metavar="N", help="cut prompts to so many tokens")
    add("--tokens", type=int, default=160, metavar="N", help="tokens of an answer (default 160)")
    add("--at-once", type=int, default=8, metavar="N", help="requests under way at a time (default 8)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts (default 0)")
    add("--tie", type=float, default=0.05, metavar="D", help="log-probabilities this near are a tie (default 0.05)")
    return parser


def ask_all(url: str, prompts: Sequence[Sequence[int]], at_once: int, tokens: int) -> list[Answer]:
    """All answers, in the order of the prompts."""
    with ThreadPoolExecutor(at_once) as clients:
        return list(clients.map(lambda prompt: ask(url, prompt, tokens), prompts))


def ask(url: str, prompt: Sequence[int], tokens: int) -> Answer:
    """A greedy answer of so many tokens."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    reply = post(url, {"input_ids": list(prompt), "sampling_params": sampling})
    return Answer(tuple(prompt), tuple(reply["output_ids"]))


def gap_of(url: str, dense: Answer, other: Answer) -> float | None:
    """How much likelier the dense model finds the dense token where two answers part; None where they do not."""
    pairs = zip(dense.tokens, other.tokens, strict=True)
    place = next((place for place, (one, two) in enumerate(pairs) if one != two), None)
    if place is None:
        return None
    both = [dense.tokens[place], other.tokens[place]]
    reply = post(
        url,
        {
            "input_ids": [*dense.prompt, *dense.tokens[:place]],
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "token_ids_logprob": both,
        },
    )
    told = {token: logprob for logprob, token, *_ in reply["meta_info"]["output_token_ids_logprobs"][0]}
    return abs(told[both[0]] - told[both[1]])


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One generation. Raises requests.HTTPError."""
    reply = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
    reply.raise_for_status()
    told: dict[str, Any] = reply.json()
    return told


def counters_of(url: str) -> dict[str, int]:
    """The plugin's counters of a server."""
    info = requests.get(f"{url}/server_info", timeout=TIMEOUT_S).json()
    counters: dict[str, int] = info["internal_states"][0]["lessismore"]["counters"]
    return counters


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
