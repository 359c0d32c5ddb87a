"""The gate before a server is timed: what it lets pass, what it stops, and that neither happens by chance."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from forced_model import ForcedModel
from streaming_endpoint import StreamingEndpoint

from benchmarks import answer_check
from benchmarks.answer_check import COLUMNS, AnswerCheck, Baseline, CheckFailed
from benchmarks.forced_logits import Forced, centred, distances

SMALL = Forced.draw(4, 60, 4, (12, 512), seed=1)
Read = Callable[[int, int, list[int]], list[int]]


def compare(first: ForcedModel, second: ForcedModel, asked: Forced = SMALL) -> tuple[Any, Any]:
    """The columns of both servers; CheckFailed if one is stopped."""
    check = AnswerCheck(asked)
    with StreamingEndpoint(model=first) as base, StreamingEndpoint(model=second) as other:
        return check.logits(base.url, base.server_info()), check.logits(other.url, other.server_info())


def only(row: int, step: int, wrong: Callable[[list[int]], list[int]]) -> Read:
    """A server that is wrong in one row of a batch at one decode step."""
    return lambda r, s, context: wrong(context) if (r, s) == (row, step) else context


def half_as_long(row: int, step: int, context: list[int]) -> list[int]:
    return context[len(context) // 2 :]


def test_equal_servers_pass_without_any_noise() -> None:
    first, second = compare(ForcedModel(), ForcedModel())
    assert tuple(first) == tuple(second) == COLUMNS
    # Only what float32 cannot resolve beside a bias of 100.
    assert 0 < float(first["logits_limit"]) < 1e-4 and float(second["logits_error"]) < float(first["logits_limit"])
    assert float(first["logits_control"]) > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_rounding_of_random_weights_passes_though_greedy_texts_would_part(seed: int) -> None:
    models = [ForcedModel(noise=0.01, draw=random.Random(f"{seed}/{name}")) for name in "ab"]
    first, second = compare(*models)
    assert 0.01 < float(first["logits_error"]) < 0.03
    assert float(second["logits_error"]) <= float(second["logits_limit"]) == float(first["logits_limit"])


@pytest.mark.parametrize("row", range(8))
def test_one_wrong_row_at_one_step_is_stopped(row: int) -> None:
    wrong = only(row, 3, lambda context: context[len(context) // 8 :])  # an eighth of its tokens is left out
    with pytest.raises(CheckFailed, match=r"its logits are 0\.\d+ from the baseline's, which is 0\.\d+ from itself"):
        compare(ForcedModel(noise=0.01), ForcedModel(noise=0.01, draw=random.Random(9), read=wrong))


def test_a_server_wrong_only_in_the_first_row_of_a_batch_is_stopped_alone_too() -> None:
    """Row 0 is every request when it is asked alone."""
    wrong = only(0, 1, lambda context: context[::-1][:-1])
    with pytest.raises(CheckFailed, match="not timed"):
        compare(ForcedModel(), ForcedModel(read=wrong))


def test_a_noisier_server_than_twice_the_baseline_is_stopped() -> None:
    with pytest.raises(CheckFailed, match="is allowed; not timed"):
        compare(ForcedModel(noise=0.01), ForcedModel(noise=0.05, draw=random.Random(9)))


def test_logits_that_are_not_finite_are_stopped() -> None:
    class Broken(ForcedModel):
        def said(self, context: Any, watched: Any, bias: Any) -> list[list[Any]]:
            return [[None, token, None] for token in watched]

    with pytest.raises(CheckFailed, match="its logits are nan"):
        compare(ForcedModel(noise=0.01), Broken())
    with pytest.raises(CheckFailed, match="cannot tell right from wrong"):
        compare(Broken(), ForcedModel())


def test_a_model_that_does_not_listen_to_its_context_checks_nothing() -> None:
    deaf = {"noise": 0.01, "attention": 0.001}
    with pytest.raises(CheckFailed, match=r"(?s)cannot tell right from wrong here.*random_checkpoint"):
        compare(ForcedModel(**deaf), ForcedModel(**deaf))  # type: ignore[arg-type]


def test_a_server_that_does_not_follow_the_bias_is_stopped() -> None:
    with pytest.raises(CheckFailed, match="does not follow logit_bias"):
        compare(ForcedModel(), ForcedModel(obeys=False))


def test_prefill_counts_as_the_baselines_noise() -> None:
    """A baseline whose decode differs from its prefill is no measure that is any stricter than that."""
    first, second = compare(ForcedModel(read=only(2, 2, lambda context: context[1:])), ForcedModel())
    assert float(first["logits_error"]) == pytest.approx(float(second["logits_error"]), rel=0.2)
    assert float(first["logits_error"]) > 0.01


def test_requests_are_forks_of_prompts_that_halve() -> None:
    asked = Forced.draw(4, 60, 4, (12, 512), seed=1)
    assert [len(prompt) for prompt in asked.prompts] == [60, 30, 15, 7]
    assert len(asked.rows) == 8 and asked.rows[0][0] is asked.rows[1][0]
    assert not set(asked.forced) & set(asked.watched) and len(set(asked.watched)) == 128
    assert asked.longest == 65 and asked == Forced.draw(4, 60, 4, (12, 512), seed=1)


def test_every_way_of_asking_begins_with_an_empty_cache_and_forces_its_tokens(stub: StreamingEndpoint) -> None:
    together, _ = SMALL.decoded(stub.url, together=True)
    alone, _ = SMALL.decoded(stub.url, together=False)
    prefilled = SMALL.prefilled(stub.url)
    assert stub.flushes == 3 and together.shape == alone.shape == prefilled.shape == (8, 4, 128)
    assert [len(request["input_ids"]) for request in stub.generate_requests] == [8] + [1] * 16
    for request in stub.generate_requests[1:9]:
        assert len(request["sampling_params"][0]["logit_bias"]) == 1
    # Another computation, but of the same contexts.
    assert distances(prefilled, together).max() < 1e-4 and distances(alone, together).max() < 1e-4


def test_distances_ignore_what_softmax_and_bias_add() -> None:
    draw = np.random.default_rng(0)
    logits = draw.standard_normal((2, 3, 16))
    shifted = logits + 100 * draw.standard_normal((2, 3, 1))
    assert distances(centred(shifted), centred(logits)).max() < 1e-12
    changed = logits.copy()
    changed[1, 2, 5] += 1
    assert np.argmax(distances(centred(changed), centred(logits))) == 5


def test_chain_answers_are_compared_with_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"first": ["3", None, "7"], "second": ["3", "5", "7"]}
    monkeypatch.setattr(answer_check, "solve_chains", lambda url, count, facts, steps: answers[url])
    check = AnswerCheck(None, chains=3, facts=9, steps=2)
    assert [check.same_answers(url) for url in answers] == ["3/3", "2/3"]
    assert check.logits("first", {}) == dict.fromkeys(COLUMNS, "")


def test_control_is_the_nearest_pair_of_prompts(stub: StreamingEndpoint) -> None:
    base = Baseline.measure(stub.url, SMALL)
    by_prompt = base.together.reshape(4, 2, 4, 128)
    by_prompt[1] = by_prompt[0] * 1.25
    assert answer_check.control(base.together, SMALL) == pytest.approx(0.2)
