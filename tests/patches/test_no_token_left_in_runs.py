"""A run of tokens whose last one was sampled from nothing: what comes before it counts, and then its request ends."""

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from lim_patches.no_token_left import FOUND, after_stops, before_results, before_stops

STOP, VOCAB = 9, 50


def request(most: int = 100, grammar: object = None) -> Req:
    """A request that has answered two tokens."""
    params = SamplingParams(max_new_tokens=most, stop_token_ids=[STOP])
    params.normalize(None)
    params.logit_bias = {"1": -100.0}
    req = Req("0", "", array("q", [1, 2]), params, eos_token_ids=set(), vocab_size=VOCAB)
    req.output_ids = array("q", [3, 4])
    req.grammar = grammar
    return req


def step(req: Req, run: list[int], *, kept: int | None = None, without: bool = True) -> None:
    """SGLang looks at the results of a step that answered `run`, of which a grammar let `kept` tokens in."""
    found = torch.tensor([without])
    result = SimpleNamespace(
        logits_output=SimpleNamespace(**{FOUND: found}), copy_done=None, accept_lens=torch.tensor([len(run)])
    )
    before_results(None, SimpleNamespace(reqs=[req]), result)
    kept = len(run) if kept is None else kept
    if kept < len(run):
        req.to_finish = FINISH_ABORT()
    req.output_ids.extend(run[:kept])
    changed = before_stops(req, kept)
    args = (req, kept) if changed is None else changed[0]
    Req.update_finish_state(*args)
    after_stops(None, *args)


def answered(req: Req) -> list[int]:
    return list(req.output_ids_through_stop)


@pytest.mark.parametrize("run", [[0], [5, 0], [5, 6, 0]])
@pytest.mark.parametrize("refused", [False, True], ids=["kept", "refused by the grammar"])
def test_the_request_ends_with_what_came_before(run: list[int], refused: bool) -> None:
    req = request()
    step(req, run, kept=len(run) - refused)
    reason = req.finished_reason.to_json()
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    said = f"after {1 + len(run)} generated tokens: logit_bias allowed none"
    assert said in reason["message"] and answered(req) == [3, 4, *run[:-1]]
    assert len(req.output_ids) == 2 + len(run) - refused, "SGLang's own numbers of tokens stay"
    assert req.to_finish is None


def test_a_stop_before_it_ends_the_request_as_a_stop() -> None:
    req = request()
    step(req, [5, STOP, 6, 0])
    assert req.finished_reason.to_json() == {"type": "stop", "matched": STOP}
    assert answered(req) == [3, 4, 5, STOP]


def test_the_length_before_it_ends_the_request_by_its_length() -> None:
    req = request(most=4)
    step(req, [5, 6, 7, 0])
    assert req.finished_reason.to_json()["type"] == "length"
    assert answered(req) == [3, 4, 5, 6]


def test_the_length_is_not_reached_by_it() -> None:
    req = request(most=4)
    step(req, [5, 0])
    assert req.finished_reason.to_json()["type"] == "abort"
    assert answered(req) == [3, 4, 5]


def test_a_grammar_that_ends_before_it_ends_the_request() -> None:
    req = request(grammar=SimpleNamespace(is_terminated=lambda: True))
    step(req, [5, 6, 7, 0], kept=2)
    assert req.finished_reason.to_json() == {"type": "stop", "matched": 6}
    assert answered(req) == [3, 4, 5, 6]


def test_other_runs_are_left_alone() -> None:
    req = request()
    step(req, [5, 6, 0], without=False)
    assert not req.finished() and answered(req) == [3, 4, 5, 6, 0]
    step(req, [7], without=False)
    assert not req.finished() and answered(req) == [3, 4, 5, 6, 0, 7]
