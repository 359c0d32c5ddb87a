"""The clients of a soak: they send jobs, leave streams, abort by id, keep sessions, and pause the server."""

import json
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from benchmarks.soak_jobs import Body, Job, Sent
from sgl_lim.programs.endpoint import EndpointError, asked, request_json

TIMEOUT_S = 600.0
"""Without a byte. A server that is slow is no failure, one that hangs is."""
TOP = 5
"""Alternatives of each token that an answer alone tells, to show ties by."""


@dataclass(frozen=True)
class Answer:
    """One finished generation."""

    job: Job
    turn: int
    tokens: tuple[int, ...]
    retracted: bool
    """Whether it, or an earlier turn of its session, was retracted: then what it had generated was prefilled."""
    cached: int
    """Prompt tokens that were found in the cache."""
    context: int
    """Tokens of the prompt, earlier turns included, and of the answer."""
    top: tuple[dict[int, float], ...] = ()
    """Log-probabilities of each token's best alternatives by their ids, if they were asked for."""
    earlier: tuple[tuple[int, ...], ...] = ()
    """What the earlier turns of its session were answered with, which is in its prompt."""


@dataclass
class Tally:
    """What the clients of a run have seen; one client may write at a time."""

    answers: list[Answer] = field(default_factory=list)
    requests: int = 0
    cuts: int = 0  # streams that were left
    aborts: int = 0  # answers that an abort ended
    refused: int = 0  # jobs whose grammar allows nothing, and which were refused or answered by nothing
    pauses: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, more: int = 1) -> None:
        """Add to a number."""
        with self.lock:
            setattr(self, name, getattr(self, name) + more)


def send(url: str, sent: Sent, tally: Tally) -> None:
    """Send a job in its way and note what comes of it; what a client should never see is noted as a failure."""
    job = sent.job
    try:
        if job.kind == "session":
            answers = session(url, job, tally)
        elif sent.ending == "whole":
            answers = whole(url, job, tally)
        else:
            answers = streamed(url, sent, tally)
    except (EndpointError, requests.RequestException, KeyError, ValueError) as error:
        if job.refused and "HTTP 400" in str(error):
            tally.count("refused")
        else:
            tally.failures.append(f"{job.kind} {job.number} ({sent.ending}): {error}")
        return
    if not job.refused:
        tally.answers.extend(answers)
    elif all(len(answer.tokens) <= 1 for answer in answers):
        # llguidance takes a dead end for the end: its mask allows the token that ends an answer.
        tally.count("refused")
    else:
        tally.failures.append(f"{job.kind} {job.number} was answered, though its grammar allows nothing")


def whole(url: str, job: Job, tally: Tally) -> list[Answer]:
    """The answers of a job of one turn, read at once."""
    tally.count("requests")
    found = request_json(f"{url}/generate", job.turns[0], timeout=TIMEOUT_S)
    return [answer_from(job, 0, item) for item in (found if isinstance(found, list) else [found])]


def streamed(url: str, sent: Sent, tally: Tally) -> list[Answer]:
    """The answers of a job of one turn, read as a stream; none if it was left or aborted before its end."""
    job, name = sent.job, uuid.uuid4().hex
    body = {**job.turns[0], "stream": True}
    if sent.ending == "abort" and job.kind != "parallel":  # several answers have several ids
        body["rid"] = name
    tally.count("requests")
    last: dict[int, dict[str, Any]] = {}
    tokens: dict[int, list[int]] = {}
    with asked(f"{url}/generate", body, timeout=TIMEOUT_S, stream=True) as reply:
        for place, event in enumerate(events(reply)):
            if sent.ending != "streamed" and place >= sent.after:
                if "rid" not in body:
                    tally.count("cuts")
                    return []
                if place == sent.after:
                    post(f"{url}/abort_request", {"rid": name})
            if "error" in event:
                raise ValueError(f"the stream has an error: {event['error']}")
            index = event.get("index", 0)
            last[index] = event
            # A server may send what is new, or all so far.
            known, new = tokens.setdefault(index, []), event["output_ids"]
            total = event["meta_info"]["completion_tokens"]
            tokens[index] = new if len(new) == total else [*known, *new]
    if any(event["meta_info"]["finish_reason"]["type"] == "abort" for event in last.values()):
        tally.count("aborts")
        return []
    return [answer_from(job, 0, {**event, "output_ids": tokens[index]}) for index, event in last.items()]


def session(url: str, job: Job, tally: Tally) -> list[Answer]:
    """The answers of a session's turns, one after the other."""
    name = request_json(f"{url}/open_session", {"capacity_of_str_len": 1 << 20}, timeout=TIMEOUT_S)
    answers: list[Answer] = []
    before = None
    try:
        for turn, body in enumerate(job.turns):
            tally.count("requests")
            asks = {**body, "session_params": {"id": name, "rid": before}}
            item = request_json(f"{url}/generate", asks, timeout=TIMEOUT_S)
            before = item["meta_info"]["id"]
            answers.append(answer_from(job, turn, item, answers))
    finally:
        post(f"{url}/close_session", {"session_id": name})
    return answers


def alone(url: str, job: Job) -> list[Answer]:
    """A job's answers on a server that does nothing else and has an empty cache, with alternatives of each token."""
    tops = {"return_logprob": True, "top_logprobs_num": TOP}
    turns = []
    for body in job.turns:
        sampling = {name: value for name, value in body["sampling_params"].items() if name != "n"}
        turns.append({**body, **tops, "sampling_params": sampling})
    asks = Job(job.number, job.kind, tuple(turns))
    return session(url, asks, Tally()) if job.kind == "session" else whole(url, asks, Tally())


def answer_from(job: Job, turn: int, item: Body, earlier: Sequence[Answer] = ()) -> Answer:
    """An answer from an object of `/generate`'s reply, and those of the turns before it.

    Raises:
        ValueError: it did not end by itself.
    """
    meta = item["meta_info"]
    if meta["finish_reason"]["type"] not in ("length", "stop"):
        raise ValueError(f"it ended by {meta['finish_reason']}")
    top = tuple({entry[1]: entry[0] for entry in entries} for entries in meta.get("output_top_logprobs") or ())
    tokens = tuple(item["output_ids"])
    return Answer(
        job,
        turn,
        tokens,
        retracted=meta.get("num_retractions", 0) > 0 or any(answer.retracted for answer in earlier),
        cached=meta["cached_tokens"],
        context=meta["prompt_tokens"] + len(tokens),
        top=top,
        earlier=tuple(answer.tokens for answer in earlier),
    )


def pause_now_and_then(url: str, seed: int, ended: threading.Event, tally: Tally) -> None:
    """Pause the server for fractions of a second until the load has ended, and seldom retract all that runs."""
    draw = random.Random(f"soak/pauses/{seed}")
    while not ended.wait(draw.uniform(2, 8)):
        try:
            post(f"{url}/pause_generation", {"mode": draw.choices(["in_place", "retract"], [9, 1])[0]})
            time.sleep(draw.uniform(0.05, 0.5))
        except EndpointError as error:
            tally.failures.append(f"pause: {error}")
        finally:
            post(f"{url}/continue_generation", {})
        tally.count("pauses")


def events(reply: requests.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream."""
    for line in reply.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line[len(b"data: ") :])


def post(url: str, payload: Body) -> None:
    """POST, whatever the answer's body is."""
    with asked(url, payload, timeout=TIMEOUT_S):
        pass
