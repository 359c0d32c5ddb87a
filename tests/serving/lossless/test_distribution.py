"""Answers of several tokens are distributed exactly as in ordinary decoding, and the check that says so can fail."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sgl_lim.serving.lossless import run_sampler
from sgl_lim.serving.lossless.accept import Accepted, _accepted, _after, _kept, accept, draw
from sgl_lim.serving.lossless.distributions import SamplingRules, rules_of
from sgl_lim.serving.lossless.penalties import PenaltyTable, RunPenalties
from sgl_lim.serving.lossless.run_sampler import RunSampling
from support.exact_sampling import DRAFT, FIRST, LENGTH, TARGET, VOCAB, Parameters, exact_answers, fit
from support.sampling_info import sampling_info

DRAWS = 100_000
DRAFTS = 2
"""Fewer than the tokens of an answer, so that the token after all drafts is one of them."""
LIKELY = 1e-3
"""A fit above this is taken for the right distribution. Seeds are fixed, so a right one never fails by chance."""


def next_higher(answered: Sequence[int]) -> set[int]:
    """A grammar that forbids the token after the last one."""
    return {(answered[-1] + 1) % VOCAB}


KINDS = {
    "temperature": Parameters(temperature=0.7),
    "high temperature": Parameters(temperature=1.8),
    "greedy": Parameters(temperature=0),
    "top-k": Parameters(top_k=3),
    "top-p": Parameters(top_p=0.75),
    "min-p": Parameters(min_p=0.15),
    "top-k, top-p and min-p": Parameters(temperature=1.5, top_k=4, top_p=0.9, min_p=0.1),
    "frequency penalty": Parameters(frequency_penalty=1.1),
    "presence penalty": Parameters(presence_penalty=1.3),
    "repetition penalty": Parameters(repetition_penalty=1.6),
    "fewest tokens": Parameters(min_new_tokens=3, stop_token_ids=(0, 2)),
    "logit bias": Parameters(logit_bias={1: 2.0, 3: -1.5}),
    "grammar": Parameters(forbidden=next_higher),
    "all": Parameters(
        *(0.9, 5, 0.95, 0.02, 0.4, 0.3, 1.2),
        min_new_tokens=2,
        stop_token_ids=(4,),
        logit_bias={0: 0.5},
        forbidden=next_higher,
    ),
}


class ToyGrammar:
    """`next_higher`, over the rows that have it."""

    def __init__(self, run: Tensor, rows: Tensor) -> None:
        self._forbidden = (torch.nn.functional.one_hot((run + 1) % VOCAB, VOCAB) > 0) & rows[:, None, None]

    def apply(self, logits: Tensor) -> None:
        logits.masked_fill_(self._forbidden.flatten(0, 1), float("-inf"))


def penalties_of(rows: list[Parameters], bonus: Tensor) -> RunPenalties:
    """Of rows that have answered nothing before `bonus`, and had a prompt of one token."""
    scales = [[row.frequency_penalty, row.presence_penalty, row.repetition_penalty] for row in rows]
    stops = [(*row.stop_token_ids, VOCAB, VOCAB)[:2] for row in rows]
    table = PenaltyTable(
        counts=torch.zeros(len(rows) + 1, VOCAB, dtype=torch.int32),
        scales=torch.tensor([[0.0, 0.0, 1.0], *scales]),
        lengths=torch.tensor([[0, 0], *([1, row.min_new_tokens] for row in rows)]),
        stops=torch.tensor([(VOCAB, VOCAB), *stops]),
    )
    return RunPenalties(table, torch.arange(1, len(rows) + 1), bonus, torch.ones_like(bonus))


def repeated(penalties: RunPenalties, kinds: int, draws: int) -> RunPenalties:
    """The same for `draws` requests of each of the kinds, which count for themselves."""
    which = torch.arange(kinds).repeat_interleave(draws)
    entries = torch.cat([torch.zeros(1, dtype=torch.int64), which + 1])
    table = PenaltyTable(
        *(each[entries] for each in (penalties.table.counts, penalties.table.scales)),
        penalties.table.lengths[entries],
        penalties.table.stops[entries],
    )
    return RunPenalties(table, torch.arange(1, len(entries)), penalties.bonus[which], penalties.lens[which])


def rules_for(kinds: list[Parameters], draws: int, flashinfer: bool) -> SamplingRules:
    bias = torch.tensor([[kind.logit_bias.get(token, 0.0) for token in range(VOCAB)] for kind in kinds])
    info = sampling_info(
        [kind.temperature for kind in kinds],
        [kind.top_k for kind in kinds],
        [kind.top_p for kind in kinds],
        [kind.min_p for kind in kinds],
        logit_bias=bias if bias.any() else None,
    )
    for name in ("temperatures", "top_ks", "top_ps", "min_ps", "logit_bias"):
        value = getattr(info, name)
        setattr(info, name, None if value is None else value.repeat_interleave(draws, 0))
    return rules_of(info, flashinfer=flashinfer)


def answers_of(kinds: list[Parameters], draws: int, seed: int, flashinfer: bool = False) -> Tensor:
    """Answers int64 [kinds, draws, LENGTH] of one batch, in rounds, as the worker draws them."""
    torch.manual_seed(seed)
    rules = rules_for(kinds, draws, flashinfer)
    penalties = repeated(penalties_of(kinds, torch.full((len(kinds),), FIRST)), len(kinds), draws)
    with_grammar = torch.tensor([kind.forbidden is not None for kind in kinds]).repeat_interleave(draws)
    bonus, lens = penalties.bonus, penalties.lens
    answers = torch.zeros(len(bonus), LENGTH + DRAFTS, dtype=torch.int64)
    answered = torch.zeros_like(bonus)
    for _ in range(LENGTH):
        penalties = replace(penalties, bonus=bonus, lens=lens)
        sampling = RunSampling(replace(rules, penalties=penalties), penalties, bonus, DRAFTS, group=None)
        run = [bonus]
        for _ in range(DRAFTS):
            run.append(sampling.draft(DRAFT[run[-1]]))
        tokens = torch.stack(run, 1)
        accepted = sampling.verify(TARGET[tokens].flatten(0, 1), ToyGrammar(tokens, with_grammar))
        places = (answered[:, None] + torch.arange(DRAFTS + 1)).clamp_max(LENGTH + DRAFTS - 1)
        answers.scatter_(1, places, accepted.tokens.long())
        answered = (answered + accepted.accept_lens).clamp_max(LENGTH)
        bonus, lens = accepted.bonus, lens + accepted.accept_lens
    return answers[:, :LENGTH].view(len(kinds), draws, LENGTH)


@pytest.mark.parametrize("name", KINDS)
def test_each_parameter_alone(name: str) -> None:
    answers = answers_of([KINDS[name]], DRAWS, seed=11)
    assert fit(answers[0], exact_answers(KINDS[name])) > LIKELY


def test_batches_of_all_kinds() -> None:
    answers = answers_of(list(KINDS.values()), DRAWS // 5, seed=12)
    fits = {name: fit(answer, exact_answers(kind)) for answer, (name, kind) in zip(answers, KINDS.items(), strict=True)}
    assert min(fits.values()) > LIKELY, fits


def test_filters_in_turn_as_flashinfer_applies_them() -> None:
    kind = Parameters(temperature=1.5, top_k=3, top_p=0.8, min_p=0.01)
    answers = answers_of([kind], DRAWS, seed=13, flashinfer=True)[0]
    assert fit(answers, exact_answers(kind, in_turn=True)) > LIKELY
    assert fit(answers, exact_answers(kind, in_turn=False)) < 1e-9


Accept = Callable[[Tensor, Tensor, Tensor, SamplingRules], Accepted]


def accept_by_target_alone(logits: Tensor, drafts: Tensor, q: Tensor, rules: SamplingRules) -> Accepted:
    """Wrong: a draft stays with probability p(d), and is replaced from what p has over q."""
    probs = rules.probabilities(rules.adjust(logits, drafts))
    p = probs[:, :-1].gather(2, drafts[:, :, None])[:, :, 0]
    stays = torch.rand(p.shape) < p
    last = draw(_after(probs, drafts, q, _kept(stays)))
    return _accepted(drafts, stays, last[:, None].expand(-1, probs.shape[1]))


def accept_with(after: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Accept:
    """Drafts stay by the right rule; the token after them is drawn from after(p, q, whether all stay)."""

    def wrong(logits: Tensor, drafts: Tensor, q: Tensor, rules: SamplingRules) -> Accepted:
        probs = rules.probabilities(rules.adjust(logits, drafts))
        at = drafts[:, :, None]
        stays = torch.rand(drafts.shape) * q.gather(2, at)[:, :, 0] < probs[:, :-1].gather(2, at)[:, :, 0]
        kept = _kept(stays)[:, None, None]
        here, drafted = probs.take_along_dim(kept, 1)[:, 0], q.take_along_dim(kept.clamp_max(DRAFTS - 1), 1)[:, 0]
        last = draw(after(here, drafted, kept[:, 0] == DRAFTS))
        return _accepted(drafts, stays, last[:, None].expand(-1, probs.shape[1]))

    return wrong


def accept_with_penalties_of_the_first_place(
    logits: Tensor, drafts: Tensor, q: Tensor, rules: SamplingRules
) -> Accepted:
    """Wrong: all places have the first one's penalties, as in SGLang's own speculative algorithms."""
    assert rules.penalties is not None
    for place in range(DRAFTS + 1):
        rules.penalties.apply(logits[:, place : place + 1], drafts[:, :0], 0)
    return accept(logits, drafts, q, replace(rules, penalties=None))


MUTANTS: dict[str, tuple[Accept, str]] = {
    "a draft stays by p alone": (accept_by_target_alone, "temperature"),
    "no residual": (accept_with(lambda p, q, every: p), "temperature"),
    "residual without clamp": (
        accept_with(lambda p, q, every: torch.where(every, p, (p - q).abs())),
        "temperature",
    ),
    "the last token by the draft": (
        accept_with(lambda p, q, every: torch.where(every, q, (p - q).clamp_min(0))),
        "temperature",
    ),
    "the residual after all stay": (accept_with(lambda p, q, every: (p - q).clamp_min(0)), "temperature"),
    "frequency as at the first place": (accept_with_penalties_of_the_first_place, "frequency penalty"),
    "presence as at the first place": (accept_with_penalties_of_the_first_place, "presence penalty"),
    "repetition as at the first place": (accept_with_penalties_of_the_first_place, "repetition penalty"),
    "length as at the first place": (accept_with_penalties_of_the_first_place, "fewest tokens"),
}


def test_the_harness_of_mutants_is_right() -> None:
    right = accept_with(lambda p, q, every: torch.where(every, p, (p - q).clamp_min(0)))
    assert fits_with(right, "temperature") > LIKELY


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_biased_acceptance_is_found(mutant: str) -> None:
    wrong, kind = MUTANTS[mutant]
    assert fits_with(wrong, kind) < 1e-9


def fits_with(acceptance: Accept, kind: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sampler, "accept", acceptance)
        return fit(answers_of([KINDS[kind]], DRAWS // 3, seed=11)[0], exact_answers(KINDS[kind]))
