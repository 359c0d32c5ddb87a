"""Rows of logits that leave no token: they become choosable, and their requests, and no others, end by name."""

from types import SimpleNamespace

import pytest
import torch

from lim_patches.no_token_left import FOUND, after_preprocess, after_sampling, before_results, make_choosable

INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_token_become_uniform_and_all_others_can_be_sampled(dtype):
    rows = [[-INF] * 4, [-INF, 2, -INF, -INF], [INF, 1, 2, 3], [float("nan"), 1, 2, 3], [0.5, 1, -2, 3]]
    logits = torch.tensor(rows, dtype=dtype)
    before = logits.clone()
    assert make_choosable(logits).tolist() == [True, False, False, True, False]
    assert logits[0].unique().numel() == logits[3].unique().numel() == 1
    assert torch.equal(logits[1], before[1]) and torch.equal(logits[4], before[4])
    for temperature in (1.0, 1e-6):
        probabilities = (logits.float() / temperature).softmax(dim=-1)
        chosen = torch.multinomial(probabilities, 1).view(-1)
        assert probabilities.isfinite().all() and chosen[1] == 1 and chosen[2] == 0


def test_what_a_bias_adds_up_to_forbids_as_well():
    logits = torch.full((1, 3), -3e38)
    assert make_choosable(logits).tolist() == [True]


def information(**values):
    plain = {"grammars": None, "has_custom_logit_processor": False, "logit_bias": None, "acc_scaling_penalties": None}
    return SimpleNamespace(**{**plain, "penalizer_orchestrator": None, **values})


@pytest.mark.parametrize(
    "asked", [{}, {"grammars": ["one"]}, {"logit_bias": torch.zeros(1, 2)}, {"has_custom_logit_processor": True}]
)
def test_an_accelerator_looks_only_where_tokens_may_be_taken_away(asked):
    """Nothing on the meta device can be read, so that a wait for the device would raise an error as well."""
    info, output = information(**asked), SimpleNamespace()
    after_preprocess(None, None, torch.empty(3, 5, device="meta"), info)
    after_sampling(None, None, output, info, False, [], [], None)
    found = getattr(output, FOUND)
    assert (found is None) == (not asked)
    assert found is None or found.shape == (3,)


def request(**values):
    plain = {"grammar": None, "custom_logit_processor": None, "output_ids": [7, 8], "to_finish": None}
    plain |= {"is_retracted": False, "inflight_middle_chunks": 0, "finished_len": None, "finished": lambda: False}
    return SimpleNamespace(**{**plain, "sampling_params": params(), **values})


def params(**values):
    return SimpleNamespace(**{"logit_bias": None, "min_new_tokens": 0, **values})


def results_of(requests, found):
    """What the scheduler looks at, after our hook."""
    result = SimpleNamespace(logits_output=SimpleNamespace(**{FOUND: torch.tensor(found)}), copy_done=None)
    before_results(None, SimpleNamespace(reqs=requests), result)
    return requests


def test_only_requests_without_a_token_end():
    others = [{"finished": lambda: True}, {"is_retracted": True}, {"inflight_middle_chunks": 1}]
    requests = results_of(
        [request(), request(), *(request(**values) for values in others)], [True, False, True, True, True]
    )
    assert [one.to_finish is not None for one in requests] == [True, False, False, False, False]
    assert requests[0].finished_len == 2, "the token that was sampled from nothing is left out"


@pytest.mark.parametrize(
    ("values", "said", "status"),
    [
        ({"grammar": object()}, "its grammar (regex, json_schema, ebnf or structural_tag) allowed none", 400),
        ({"sampling_params": params(logit_bias={"1": -100.0})}, "logit_bias allowed none", 400),
        (
            {"grammar": object(), "sampling_params": params(min_new_tokens=3)},
            "structural_tag) and min_new_tokens, which forbids to stop, allowed none",
            400,
        ),
        ({"custom_logit_processor": "{}"}, "its custom logit processor allowed none", 400),
        ({}, "the model's logits are not finite numbers", 500),
    ],
)
def test_the_reason_names_what_was_asked_for(values, said, status):
    (one,) = results_of([request(**values)], [True])
    reason = one.to_finish.to_json()
    assert said in reason["message"] and "after 2 generated tokens" in reason["message"]
    assert (reason["type"], reason["status_code"]) == ("abort", status)


def test_results_without_samples_are_left_alone():
    before_results(None, SimpleNamespace(reqs=[request()]), SimpleNamespace(embeddings=[]))
    before_results(None, SimpleNamespace(reqs=[request()]), SimpleNamespace(logits_output=None))
