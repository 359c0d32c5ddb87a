"""What a soak sends: a seeded pool of jobs, and a seeded order in which they are sent and ended early."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

KINDS = {
    "short": 6,
    "long": 8,
    "fork": 10,
    "parallel": 4,
    "sampled": 4,
    "regex": 3,
    "schema": 3,
    "hopeless": 1,
    "logprobs": 4,
    "session": 5,
}
"""Kinds of jobs with their shares of the pool."""
ENDINGS = {"whole": 9, "streamed": 5, "cut": 4, "abort": 2}
"""How a job is sent, with its share: read at once, as a stream, as a stream that is left, or aborted by its id."""
PREFIXES = 3
CHOICES = 3
"""Answers of a parallel job."""


@dataclass(frozen=True)
class Sizes:
    """How long prompts and answers become, in tokens."""

    longest: int
    """Of a prompt."""
    output: int
    """Of an answer, at most."""
    tokens: tuple[int, int]
    """From which ids prompts are drawn; the second is excluded."""


@dataclass(frozen=True)
class Job:
    """One request, or the turns of a session."""

    number: int
    kind: str
    turns: tuple[Body, ...]
    """Bodies of `/generate`."""

    @property
    def greedy(self) -> bool:
        """Whether its answers can be compared."""
        return self.kind not in ("sampled", "hopeless")

    @property
    def refused(self) -> bool:
        """Whether the server has to refuse it, or to answer nothing, as its grammar allows nothing."""
        return self.kind == "hopeless"


@dataclass(frozen=True)
class Sent:
    """A job and how it is sent."""

    job: Job
    ending: str
    after: int
    """Events of a stream that are read before it is left or aborted."""


def make_jobs(number: int, seed: int, sizes: Sizes, adapters: Sequence[str] = ()) -> list[Job]:
    """A pool of so many jobs, at least one of each kind; every other one asks for one of the adapters, if there are."""
    draw = random.Random(f"soak/jobs/{seed}")
    prefixes = [_prompt(draw, sizes, sizes.longest // 2, sizes.longest * 3 // 4) for _ in range(PREFIXES)]
    kinds = list(KINDS) + draw.choices(list(KINDS), list(KINDS.values()), k=max(0, number - len(KINDS)))
    jobs = []
    for place, kind in enumerate(kinds):
        turns = tuple(_turns(kind, draw, sizes, prefixes))
        if adapters and place % 2:
            name = draw.choice(adapters)
            turns = tuple({**turn, "lora_path": name} for turn in turns)
        jobs.append(Job(place, kind, turns))
    return jobs


def order(jobs: Sequence[Job], seed: int) -> Iterator[Sent]:
    """Jobs without end, as they are sent. A fork comes with one or two others, so that they share prefixes in time."""
    draw = random.Random(f"soak/order/{seed}")
    forks = [job for job in jobs if job.kind == "fork"]
    while True:
        job = draw.choice(jobs)
        batch = [job, *draw.choices(forks, k=draw.randint(1, 2))] if job.kind == "fork" else [job]
        for one in batch:
            # A session is a client that waits for its turns, and what is refused has no stream.
            whole = one.kind == "session" or one.refused
            ending = "whole" if whole else draw.choices(list(ENDINGS), list(ENDINGS.values()))[0]
            yield Sent(one, ending, draw.randint(0, 12))


def _turns(kind: str, draw: random.Random, sizes: Sizes, prefixes: Sequence[list[int]]) -> Iterator[Body]:
    """The bodies of a job."""
    short, long = (4, max(5, sizes.longest // 8)), (sizes.longest // 2, sizes.longest)
    sampling: Body = {"temperature": 0, "ignore_eos": True, "max_new_tokens": draw.randint(4, sizes.output)}
    body: Body = {"input_ids": _prompt(draw, sizes, *(short if kind in ("short", "hopeless") else long))}
    if kind == "fork":
        body["input_ids"] = [*draw.choice(prefixes), *_prompt(draw, sizes, *short)]
    elif kind == "parallel":
        sampling["n"] = CHOICES
    elif kind == "sampled":
        sampling |= {"temperature": 0.9, "top_p": 0.95}
    elif kind == "regex":
        sampling |= {"regex": "([0-9]+ ?)+", "ignore_eos": False}
    elif kind == "schema":
        sampling |= {"json_schema": '{"type": "integer"}', "ignore_eos": False}
    elif kind == "hopeless":
        sampling |= {"regex": r"[^\s\S]", "temperature": 1, "ignore_eos": False}
    elif kind == "logprobs":
        # Log-probabilities of the prompt too, which is prefilled in chunks.
        body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}
    yield {**body, "sampling_params": sampling}
    if kind == "session":
        for _ in range(draw.randint(1, 2)):
            yield {"input_ids": _prompt(draw, sizes, *short), "sampling_params": dict(sampling)}


def _prompt(draw: random.Random, sizes: Sizes, least: int, most: int) -> list[int]:
    """Random token ids."""
    return [draw.randrange(*sizes.tokens) for _ in range(draw.randint(least, most))]
