"""Accepting drafts: shapes and cases that need no chance."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sgl_lim.serving.lossless.accept import accept, draw
from sgl_lim.serving.lossless.distributions import rules_of
from support.sampling_info import sampling_info

VOCAB = 11


def logits_with(best: list[list[int]]) -> torch.Tensor:
    """Random logits [B, n, V] whose best token is given."""
    places = torch.tensor(best)
    logits = torch.randn(*places.shape, VOCAB, generator=torch.Generator().manual_seed(3))
    return logits.scatter_(2, places[:, :, None], 9.0)


@pytest.mark.parametrize("mixed", [False, True], ids=["all greedy", "beside a sampled row"])
def test_a_greedy_row_keeps_drafts_up_to_the_first_that_is_not_best(mixed: bool) -> None:
    best = [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [1, 2, 3, 4]]
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [1, 2, 3]])
    info = sampling_info([0, 0, 0, 1.0 if mixed else 0])
    accepted = accept(logits_with(best), drafts, None, rules_of(info))
    assert accepted.tokens[:3].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0]]
    assert accepted.accept_lens[:3].tolist() == [4, 2, 1]
    assert accepted.bonus[:3].tolist() == [8, 6, 5]
    assert (accepted.tokens.dtype, accepted.accept_lens.dtype, accepted.bonus.dtype) == (
        torch.int32,
        torch.int32,
        torch.int64,
    )


@pytest.mark.parametrize("temperature", [0, 0.01])
def test_without_drafts_one_token_is_drawn(temperature: float) -> None:
    none = torch.empty(2, 0, dtype=torch.int64)
    accepted = accept(logits_with([[4], [9]]), none, None, rules_of(sampling_info([temperature] * 2)))
    assert accepted.tokens.tolist() == [[4], [9]]
    assert accepted.accept_lens.tolist() == [1, 1]
    assert accepted.bonus.tolist() == [4, 9]


def test_a_draft_from_the_same_distribution_always_stays() -> None:
    rules = rules_of(sampling_info([0.7] * 500, top_p=[0.8] * 500))
    logits = torch.randn(500, 4, VOCAB)
    probs = rules.probabilities(logits)
    drafts = draw(probs[:, :3].flatten(0, 1)).view(500, 3)
    accepted = accept(logits, drafts, probs[:, :3], rules)
    assert accepted.accept_lens.eq(4).all()
    assert torch.equal(accepted.tokens[:, :3].long(), drafts)


def test_a_draft_that_cannot_be_drawn_never_stays_and_is_never_drawn_again() -> None:
    rules = rules_of(sampling_info([1.0] * 500, top_k=[3] * 500))
    logits = torch.randn(500, 2, VOCAB)
    worst = logits[:, 0].argmin(-1, keepdim=True)
    certain = torch.zeros(500, 1, VOCAB).scatter_(2, worst[:, None], 1.0)
    for draft_probs in (None, certain):
        accepted = accept(logits.clone(), worst, draft_probs, rules)
        assert accepted.accept_lens.eq(1).all()
        assert (accepted.bonus != worst[:, 0]).all()
        assert rules.probabilities(logits)[:, 0].gather(1, accepted.bonus[:, None]).gt(0).all()


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.zeros(2000, VOCAB)
    weights[:, 3], weights[:, 7] = 1e-30, 1.0
    assert set(draw(weights).tolist()) <= {3, 7}


def test_logits_hold_the_bias_afterwards() -> None:
    bias = torch.zeros(2, VOCAB)
    bias[1, 4] = 50.0
    logits = torch.randn(2, 2, VOCAB)
    raw = logits.clone()
    accepted = accept(logits, torch.tensor([[4], [4]]), None, rules_of(sampling_info([0, 0], logit_bias=bias)))
    assert torch.equal(logits, raw + bias[:, None])
    assert accepted.tokens[1].tolist() == [4, 4]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_benchmark_draws_how_many_drafts_stay(temperature: float) -> None:
    torch.manual_seed(4)
    rows, drafts = 20_000, 3
    rules = replace(rules_of(sampling_info([temperature] * rows)), drawn_acceptance=0.9)
    accepted = accept(torch.zeros(rows, drafts + 1, VOCAB), torch.full((rows, drafts), 5), None, rules)
    for count in range(1, drafts + 1):
        assert (accepted.accept_lens > count).float().mean() == pytest.approx(0.9**count, abs=0.01)


def test_custom_processors_see_one_place_after_everything_else() -> None:
    bias = torch.zeros(1, VOCAB)
    bias[0, 4] = 50.0
    seen: list[torch.Tensor] = []

    def processor(logits: torch.Tensor) -> None:
        seen.append(logits.clone())
        logits[:, 4] = float("-inf")

    rules = replace(rules_of(sampling_info([0], logit_bias=bias)), processors=processor)
    logits = torch.zeros(1, 1, VOCAB)
    accepted = accept(logits, torch.empty(1, 0, dtype=torch.int64), None, rules)
    assert torch.equal(seen[0], bias) and accepted.bonus.item() == 0
    with pytest.raises(ValueError, match="without drafts, got 1"):
        accept(torch.zeros(1, 2, VOCAB), torch.zeros(1, 1, dtype=torch.int64), None, rules)


class Forbids:
    """A grammar that allows no token at these places, bool [B, n]."""

    def __init__(self, places: list[list[bool]]) -> None:
        self._places = torch.tensor(places).flatten()

    def apply(self, logits: torch.Tensor) -> None:
        logits.masked_fill_(self._places[:, None], float("-inf"))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("with_probs", [False, True])
def test_an_answer_ends_where_no_token_is_left_and_only_there(temperature: float, with_probs: bool) -> None:
    """The drafts are token 0, which is the first of the best where all are alike."""
    left, none = False, True
    mask = Forbids([[none, none, none], [left, none, left], [left, left, none], [left, none, none], [left] * 3])
    drafts = torch.zeros(5, 2, dtype=torch.int64)
    logits = logits_with([[0, 0, 5]] * 3 + [[4, 0, 0], [0, 0, 5]])
    probs = torch.nn.functional.one_hot(drafts, VOCAB).float() if with_probs else None
    rules = rules_of(sampling_info([min(temperature, 0.01)] * 5)).masked(mask)
    accepted = accept(logits, drafts, probs, rules)
    assert accepted.accept_lens.tolist() == [1, 2, 3, 1, 3]
    assert accepted.without_token is not None
    assert accepted.without_token.tolist() == [True, True, True, False, False]
    assert accepted.bonus[3:].tolist() == [4, 5]
    assert logits.isfinite().all(), "log-probabilities are numbers"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_round_without_drafts_ends_an_answer(temperature: float) -> None:
    rules = rules_of(sampling_info([temperature] * 2)).masked(Forbids([[True], [False]]))
    accepted = accept(logits_with([[4], [9]]), torch.empty(2, 0, dtype=torch.int64), None, rules)
    assert accepted.without_token is not None and accepted.without_token.tolist() == [True, False]
    assert accepted.accept_lens.tolist() == [1, 1]


def test_chance_ends_where_no_token_is_left() -> None:
    rules = replace(rules_of(sampling_info([1.0])).masked(Forbids([[False, True, False]])), drawn_acceptance=1.0)
    accepted = accept(torch.zeros(1, 3, VOCAB), torch.zeros(1, 2, dtype=torch.int64), None, rules)
    assert accepted.accept_lens.tolist() == [2] and accepted.without_token is not None
    assert accepted.without_token.tolist() == [True]


@pytest.mark.parametrize("asked", [{}, {"mask": Forbids([[False]])}, {"logit_bias": torch.zeros(1, 1)}])
def test_an_accelerator_looks_only_where_tokens_may_be_taken_away(asked: dict[str, Any]) -> None:
    assert replace(rules_of(sampling_info([1.0])), **asked).takes_tokens == bool(asked)
