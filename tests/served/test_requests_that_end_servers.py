"""Requests at which SGLang ends its scheduler: each is refused or ends alone, and all others are answered right."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.agreement import same_tokens
from support.fleet import MAIN, NEXT_CASES, random_prompt
from support.server import Server

pytestmark = [pytest.mark.served, pytest.mark.parametrize("case", [MAIN, NEXT_CASES[0]], ids=str, indirect=True)]

PROMPT = random_prompt(300, 420)
BEYOND = 1 << 20
"""No token id."""


def sampling(**values: Any) -> dict[str, Any]:
    return {"input_ids": PROMPT[:9], "sampling_params": {"max_new_tokens": 4, "temperature": 1, **values}}


def hopeless(**values: Any) -> dict[str, Any]:
    """No character fits, so that no token does."""
    return sampling(regex=r"[^\s\S]", **values)


NATIVE = {
    "ids": ({"input_ids": [BEYOND]}, "token ids of this model are 0 to"),
    "negative-ids": ({"input_ids": [-1]}, "token ids of this model are 0 to"),
    "one-of-a-batch": ({"input_ids": [[20], [BEYOND]]}, "token ids of this model are 0 to"),
    "top-logprobs": ({**sampling(), "return_logprob": True, "top_logprobs_num": BEYOND}, "the vocabulary has"),
    "negative-start": ({**sampling(), "return_logprob": True, "logprob_start_len": -5}, "logprob_start_len is -5"),
    "ids-logprob": ({**sampling(), "return_logprob": True, "token_ids_logprob": [BEYOND]}, "valid range is"),
    "suppressed-stop": (sampling(stop_token_ids=[BEYOND], min_new_tokens=2), "stop_token_ids has"),
    "text-bias": (sampling(logit_bias={"5": "x"}), "logit_bias is"),
    "infinite-bias": (sampling(logit_bias={"5": 1e39}), "logit_bias has 1e+39"),
    "fraction": (sampling(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    "top-k": (sampling(top_k=1 << 40), "top_k is"),
    "hopeless": (hopeless(), "no token of the vocabulary is left to choose after 0 generated tokens: its grammar"),
    "hopeless-end": (
        sampling(regex="[0-9]", min_new_tokens=4),
        "and min_new_tokens, which forbids to stop, allowed none",
    ),
    "hopeless-greedy": (hopeless(temperature=0), "no token of the vocabulary is left"),
    "hopeless-top-p": (hopeless(top_p=0.9), "no token of the vocabulary is left"),
    "hopeless-schema": (sampling(json_schema='{"enum": ["漢字"]}'), "no token of the vocabulary is left"),
}
OPENAI = {
    "ids": ({"prompt": [BEYOND]}, "token ids of this model are 0 to"),
    "logprobs": ({"prompt": "v1", "logprobs": BEYOND}, "the vocabulary has"),
    "echoed-logprobs": ({"prompt": "v1", "logprobs": BEYOND, "echo": True}, "the vocabulary has"),
    "hopeless": ({"prompt": "v1", "regex": r"[^\s\S]"}, "no token of the vocabulary is left"),
}


def test_they_are_refused_by_name_while_others_are_answered(server: Server) -> None:
    alone = server.generate_one(PROMPT, 96)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(server.generate_one, PROMPT, 96)
        wrong = [
            (name, reply.status_code, reply.text)
            for path, cases in (("/generate", NATIVE), ("/v1/completions", OPENAI))
            for name, (body, said) in cases.items()
            if (reply := server.post(path, {"model": "m", "max_tokens": 4, **body} if path[1] == "v" else body))
            and (reply.status_code != 400 or said not in reply.text)
        ]
        assert not wrong
        assert same_tokens([alone], [beside.result()])
    server.check_alive()
    assert "Scheduler hit an exception" not in server.log()


def test_a_bias_that_forbids_all_ends_its_request_alone(server: Server) -> None:
    size = server.get("/model_info").json().get("vocab_size") or vocabulary(server)
    everything = {str(token): -3e38 for token in range(size)}
    alone = server.generate_one(PROMPT, 24)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(server.generate_one, PROMPT, 24)
        reply = server.post("/generate", sampling(logit_bias=everything, temperature=0.5))
        assert reply.status_code == 400 and "logit_bias allowed none" in reply.text
        assert same_tokens([alone], [beside.result()])


def vocabulary(server: Server) -> int:
    """The model's size, as the refusal of a token id tells it."""
    said = server.post("/generate", {"input_ids": [BEYOND]}).text
    return int(said.split("token ids of this model are 0 to ")[1].split('"')[0]) + 1


def test_a_stream_ends_by_an_abort_that_says_why(server: Server) -> None:
    reply = server.post("/generate", {**hopeless(), "stream": True}, stream=True)
    events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
    reason = events[-1]["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and "no token of the vocabulary is left" in reason["message"]
    assert not events[-1]["output_ids"] and not events[-1]["text"]


def test_a_grammar_that_runs_out_of_tokens_keeps_what_was_generated(server: Server) -> None:
    """After the digits comes a character that no token has."""
    reply = server.post("/generate", {**sampling(regex="[0-9]{1,2}漢"), "stream": True}, stream=True)
    events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith(b"data: {")]
    reason = events[-1]["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and "no token of the vocabulary is left" in reason["message"]
    assert "after 0 generated" not in reason["message"]
    # Each token of this tokenizer begins a word.
    digits = events[-1]["text"].split()
    assert len(digits) in (1, 2) and all(digit.isdigit() for digit in digits)
