"""Numbers of a request that the scheduler could not serve are refused by name, and all others are not."""

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from lim_patches.requests_out_of_range import after_create

MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


def made(params=None, **values):
    """A tokenized request."""
    plain = {"input_ids": array("q", [0, 99]), "mm_inputs": None, "top_logprobs_num": 0, "logprob_start_len": -1}
    return SimpleNamespace(**{**plain, **values}, sampling_params=SamplingParams(**(params or {})))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (made(input_ids=array("q", [3, 100, -1])), "input_ids has 100, -1; token ids of this model are 0 to 99"),
        (made(input_ids=array("q", [100] * 9)), "100, …;"),
        (made(top_logprobs_num=101), "top_logprobs_num (logprobs, top_logprobs) is 101; the vocabulary has 100 tokens"),
        (made(top_logprobs_num=-1), "is -1"),
        (made(logprob_start_len=-5), "logprob_start_len is -5; use a place in the prompt, or -1"),
        (made({"stop_token_ids": [100], "min_new_tokens": 2}), "stop_token_ids has 100"),
        (made({"top_k": 2**31}), "top_k is 2147483648; use -1"),
        (made({"sampling_seed": 2**63}), "sampling_seed is 9223372036854775808"),
        (made({"logit_bias": {"5": 1e39}}), "logit_bias has 1e+39; use numbers within ±3.4e+38"),
        (made({"logit_bias": {"5": float("nan")}}), "logit_bias has nan"),
        (made({"logit_bias": {"5": "x"}}), "logit_bias is {'5': 'x'}: Expected `float`, got `str`"),
        (made({"max_new_tokens": 2.5}), "max_new_tokens is 2.5: Expected `int | null`, got `float`"),
        (made({"json_schema": {"type": "object"}}), "json_schema is {'type': 'object'}: Expected `str | null`"),
    ],
)
def test_what_the_scheduler_could_not_serve_is_refused(request_, said):
    with pytest.raises(ValueError) as refused:
        after_create(request_, MANAGER)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "request_",
    [
        made(),
        made(input_ids=None),
        made(input_ids=array("q", [100]), mm_inputs=object()),
        made(top_logprobs_num=100, logprob_start_len=0),
        made(top_logprobs_num=None, logprob_start_len=None),
        # Some tokenizers know more tokens than the model; such an id is never generated.
        made({"stop_token_ids": [100]}),
        made({"temperature": 1, "top_k": -1, "logit_bias": {"5": -100}, "sampling_seed": 7}),
        made({"custom_params": {"a": object()}}),
    ],
)
def test_what_it_serves_is_not(request_):
    assert after_create(request_, MANAGER) is None


def test_all_reasons_are_said_at_once():
    with pytest.raises(ValueError, match=r"input_ids has 100.*; top_logprobs_num .* is 101"):
        after_create(made(input_ids=array("q", [100]), top_logprobs_num=101), MANAGER)
