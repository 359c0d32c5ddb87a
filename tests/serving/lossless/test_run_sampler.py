"""What the worker asks for in a round: drafts, acceptance, and one answer for all ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_lim.serving.lossless.run_sampler import RunSampler
from support.sampling_info import sampling_info

VOCAB, ROWS, DRAFTS = 9, 3, 2


class Request:
    """A request without penalties."""

    sampling_params = SimpleNamespace(
        frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
    )


class Wire:
    """A tensor-parallel group of two ranks in turn: what the first broadcasts, the second receives."""

    world_size = 2

    def __init__(self, sent: list[Tensor], first: bool) -> None:
        self._sent, self._first = sent, first

    def broadcast(self, values: Tensor, src: int) -> None:
        assert src == 0
        if self._first:
            self._sent.append(values.clone())
        else:
            values.copy_(self._sent.pop(0))


def one_round(
    temperature: float, seed: int, group: Any, bias: Tensor | None = None, has_grammar: bool = False
) -> tuple[Tensor, Any]:
    """Drafts and what is accepted of them, by logits that do not depend on the rank, and by chance that does."""
    torch.manual_seed(seed)
    batch = SimpleNamespace(
        reqs=[Request()] * ROWS,
        sampling_info=sampling_info([temperature] * ROWS, logit_bias=bias),
        has_grammar=has_grammar,
    )
    sampling = RunSampler(VOCAB, "cpu", group).begin(batch, torch.zeros(ROWS).long(), torch.ones(ROWS).long(), DRAFTS)
    logits = torch.randn(ROWS, DRAFTS + 1, VOCAB, generator=torch.Generator().manual_seed(1))
    for place in range(DRAFTS):
        sampling.draft(logits[:, place] + 0.5)
    return sampling.drafts, sampling.verify(logits.flatten(0, 1))


@pytest.mark.parametrize(("temperature", "has_grammar"), [(1.0, False), (0.0, True)])
def test_ranks_draw_what_the_first_one_draws(temperature: float, has_grammar: bool) -> None:
    for seed in range(20):
        sent: list[Tensor] = []
        drafts, accepted = one_round(temperature, seed, Wire(sent, first=True), has_grammar=has_grammar)
        assert len(sent) == DRAFTS + 1
        others, others_accepted = one_round(temperature, seed + 1000, Wire(sent, first=False), has_grammar=has_grammar)
        assert torch.equal(drafts, others) and not sent
        assert vars(accepted).keys() == vars(others_accepted).keys()
        for name, value in vars(accepted).items():
            other = getattr(others_accepted, name)
            assert torch.equal(value, other) and value.dtype == other.dtype, name


def test_a_round_that_is_over_holds_no_distributions() -> None:
    info = sampling_info([1.0] * ROWS)
    batch = SimpleNamespace(reqs=[Request()] * ROWS, sampling_info=info, has_grammar=False)
    sampling = RunSampler(VOCAB, "cpu").begin(batch, torch.zeros(ROWS).long(), torch.ones(ROWS).long(), DRAFTS)
    for _ in range(DRAFTS):
        sampling.draft(torch.randn(ROWS, VOCAB))
    sampling.verify(torch.randn(ROWS * (DRAFTS + 1), VOCAB))
    held = [value.numel() for value in vars(sampling).values() if isinstance(value, Tensor)]
    assert max(held) == ROWS * DRAFTS


@pytest.mark.parametrize("group", [None, SimpleNamespace(world_size=1), Wire([], first=True)])
def test_greedy_ranks_and_single_ones_need_no_word(group: Any) -> None:
    drafts, accepted = one_round(0, 3, group)
    assert torch.equal(accepted.tokens[:, :DRAFTS].long(), drafts)
    assert not getattr(group, "_sent", [])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ranks_end_the_same_answers(temperature: float) -> None:
    """A bias that forbids all, of the second row; it is found after the first rank has said what stays."""
    bias = torch.zeros(ROWS, VOCAB)
    bias[1] = float("-inf")
    sent: list[Tensor] = []
    for seed, first in ((1, True), (2, False)):
        _, accepted = one_round(temperature, seed, Wire(sent, first), bias)
        assert accepted.without_token.tolist() == [False, True, False]
        assert accepted.accept_lens[1] == 1
