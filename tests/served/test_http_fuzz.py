"""Does the server live through nonsense, and does it still answer right?"""

import json
import random
import re
import string
from collections.abc import Iterator
from typing import Any

import pytest

from support.agreement import same_tokens
from support.fleet import MAIN, random_prompt
from support.server import Server

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", [MAIN], ids=str, indirect=True)]

PROMPT = random_prompt(300, 400)
VALID: dict[str, Any] = {"input_ids": [20, 21, 22], "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
NONSENSE: list[Any] = [None, True, -1, 0, 1e30, 2**63, "", "\u0000", "é漢😀", [], [[]], {}, {"a": 1}, [None], ["x", 3]]


def sampling(**values: Any) -> dict[str, Any]:
    return {**VALID, "sampling_params": {**VALID["sampling_params"], **values}}


REFUSED: dict[str, Any] = {
    "no-prompt": {"sampling_params": {}},
    "empty-ids": {"input_ids": []},
    "ids-of-strings": {"input_ids": ["a", "b"]},
    "over-long-prompt": {**VALID, "input_ids": [20] * 5000},
    "huge-max-new-tokens": sampling(max_new_tokens=10**9),
    "negative-max-new-tokens": sampling(max_new_tokens=-1),
    "text-max-new-tokens": sampling(max_new_tokens="many"),
    "negative-temperature": sampling(temperature=-1),
    "top-p-above-one": sampling(top_p=2),
    "unknown-sampling-parameter": sampling(no_such_parameter=1),
}
RAW_BODIES = {
    "empty": b"",
    "not-json": b"{",
    "invalid-utf8": b'{"text": "\xff\xfe"}',
    "json-scalar": b"7",
    "json-list": b"[1, 2]",
    "deep": b"[" * 3000 + b"]" * 3000,
    "nan": b'{"input_ids": [20], "sampling_params": {"temperature": NaN}}',
}


@pytest.fixture
def sound(server: Server) -> Iterator[Server]:
    """The server; afterwards it has to answer as before."""
    before = server.generate_one(PROMPT, 8)
    yield server
    server.check_alive()
    assert same_tokens([before], [server.generate_one(PROMPT, 8)])
    assert "Scheduler hit an exception" not in server.log()


def test_requests_that_make_no_sense_are_refused(sound: Server) -> None:
    answered = {name for name, body in REFUSED.items() if sound.post("/generate", body).status_code < 400}
    assert not answered


def test_bodies_that_are_no_requests_are_refused(sound: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answers = {name: sound.post("/generate", data=data, headers=headers) for name, data in RAW_BODIES.items()}
    assert not {name for name, reply in answers.items() if reply.status_code < 400}


def test_limits_are_answered(sound: Server) -> None:
    context = sound.get("/model_info").json().get("max_context_length") or 4096
    assert len(sound.generate_one([20], 1).tokens) == 1
    assert len(sound.generate_one(random_prompt(context - 8, 401), 4).tokens) == 4
    assert len(sound.generate_one([20, 21], 0).tokens) == 0
    assert (
        sound.post("/generate", {"text": " ".join(["v1", "->", "é漢😀", "\u0000"] * 9), **sampling()}).status_code < 500
    )


def test_a_grammar_is_kept_to_and_a_wrong_one_is_refused(sound: Server) -> None:
    regex = r"(v[0-9]+ ?-> ?)+"
    reply = sound.post("/generate", {"input_ids": PROMPT, **sampling(regex=regex, max_new_tokens=6, ignore_eos=True)})
    assert reply.status_code == 200
    assert re.match(r"\s*v\d+\s?(\d+\s?)*(->|$)", reply.json()["text"]), reply.json()["text"]
    assert sound.post("/generate", sampling(regex="(")).status_code == 400


@pytest.mark.parametrize("seed", range(3))
def test_random_fields_never_break_the_server(sound: Server, seed: int) -> None:
    # SGLang's HTTP layer answers some wrong types with 500, so a status proves nothing: `sound` looks at what is left.
    rng = random.Random(f"fuzz/{seed}")
    statuses = {sound.post("/generate", random_body(rng)).status_code for _ in range(40)}
    assert {200, 400} <= statuses


def random_body(rng: random.Random) -> dict[str, Any]:
    """A valid request with one to three fields replaced or added."""
    body = json.loads(json.dumps(VALID))
    for _ in range(rng.randint(1, 3)):
        target = (
            body["sampling_params"] if isinstance(body.get("sampling_params"), dict) and rng.random() < 0.6 else body
        )
        names = [
            *target,
            "n",
            "top_p",
            "stop",
            "stop_token_ids",
            "logit_bias",
            "min_new_tokens",
            "rid",
            "return_logprob",
        ]
        name = rng.choice([*names, "".join(rng.choices(string.ascii_lowercase, k=5))])
        target[name] = rng.choice(NONSENSE)
    return body
