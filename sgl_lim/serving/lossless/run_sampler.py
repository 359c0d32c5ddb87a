"""Draws the drafts of a round and accepts them, for the worker."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.sampler import SYNC_TOKEN_IDS_ACROSS_TP
from torch import Tensor

from lim_patches.no_token_left import make_choosable
from sgl_lim.serving.lossless.accept import Accepted, accept, draw
from sgl_lim.serving.lossless.distributions import SamplingRules, TokenMask, rules_of
from sgl_lim.serving.lossless.penalties import PenaltyMemory, RunPenalties


class RunSampler:
    """Of all rounds of a server.

    Args:
        vocab: width of the logits.
        device: of the logits.
        group: SGLang's `GroupCoordinator` of the tensor-parallel ranks, or None where there is one rank. Ranks can draw
            differently, because their logits differ by rounding, so the first rank's tokens are everybody's.
        flashinfer: whether SGLang samples with FlashInfer.
        drawn_acceptance: with which probability each draft stays in a benchmark; None: as it must.
    """

    def __init__(
        self,
        vocab: int,
        device: torch.device | str,
        group: Any = None,
        flashinfer: bool = False,
        drawn_acceptance: float | None = None,
    ) -> None:
        self._memory = PenaltyMemory(vocab, device)
        self._group = group if group is not None and group.world_size > 1 else None
        self._flashinfer = flashinfer
        self.drawn_acceptance = drawn_acceptance

    def prefill(self, reqs: Sequence[Any]) -> None:
        """Note the requests of a prefill."""
        self._memory.prefill(reqs)

    @staticmethod
    def needs_plain_round(batch: Any) -> bool:
        """Whether a batch must decode a token at a time: custom logit processors may look at the answer so far."""
        return bool(batch.sampling_info.has_custom_logit_processor)

    def begin(self, batch: Any, bonus: Tensor, lens: Tensor, drafts: int) -> "RunSampling":
        """A round.

        Args:
            batch: SGLang's ScheduleBatch.
            bonus: int64 [B], the tokens that the rows begin with.
            lens: int64 [B], tokens with KV.
            drafts: how many will be drawn.
        """
        penalties = self._memory.of(batch.reqs, bonus, lens)
        rules = rules_of(batch.sampling_info, penalties, self._flashinfer)
        rules = replace(rules, drawn_acceptance=self.drawn_acceptance)
        # SGLang's rule too: greedy ranks agree by themselves, but with a grammar it makes sure.
        asks = not rules.all_greedy or batch.has_grammar or SYNC_TOKEN_IDS_ACROSS_TP
        return RunSampling(rules, penalties, bonus, drafts, self._group if asks else None)


class RunSampling:
    """One round: `draft` so often as was said, then `verify` once.

    Args:
        group: whose first rank says what is drafted and accepted; None: ranks need no word.
    """

    def __init__(
        self, rules: SamplingRules, penalties: RunPenalties | None, bonus: Tensor, drafts: int, group: Any
    ) -> None:
        self._rules, self._penalties, self._bonus, self._group = rules, penalties, bonus, group
        self._tokens = torch.empty(len(bonus), drafts, dtype=torch.int64, device=bonus.device)
        self._probs: Tensor | None = None
        self._drawn = 0

    @property
    def drafts(self) -> Tensor:
        """int64 [B, k], drawn so far."""
        return self._tokens[:, : self._drawn]

    @property
    def run(self) -> Tensor:
        """int64 [B, k + 1], the token that each row begins with, and its drafts so far."""
        return torch.cat([self._bonus[:, None], self.drafts], dim=1)

    def draft(self, logits: Tensor) -> Tensor:
        """The next token of each row, int64 [B], by a draft's logits [B, V], which are changed in place."""
        logits = self._rules.adjust(logits[:, None], self.drafts, first=self._drawn)
        if self._rules.all_greedy:
            token = self._first_ranks(logits[:, 0].argmax(-1))
        else:
            if self._rules.takes_tokens:
                make_choosable(logits)
            probs = self._rules.probabilities(logits)[:, 0]
            if self._probs is None:
                self._probs = probs.new_empty(len(probs), self._tokens.shape[1], probs.shape[1])
            self._probs[:, self._drawn] = probs
            token = self._first_ranks(draw(probs))
        self._tokens[:, self._drawn] = token
        self._drawn += 1
        return token

    def verify(self, logits: Tensor, mask: TokenMask | None = None) -> Accepted:
        """Accept the drafts by the dense model's logits [B * (k + 1), V], which are changed in place as `accept` says.

        Args:
            logits: of the token that the round begins with, and of each draft.
            mask: a grammar's, of the same rows.
        """
        places = logits.view(len(self._tokens), self._drawn + 1, -1)
        # SGLang keeps a round until two more were launched, which must not triple what is the largest in it.
        probs, self._probs = self._probs, None
        if probs is not None:
            probs = probs[:, : self._drawn]
        accepted = self._of_first_rank(accept(places, self.drafts, probs, self._rules.masked(mask)))
        if self._penalties is not None:
            self._penalties.learn(self.drafts, accepted.accept_lens)
        return accepted

    def _of_first_rank(self, accepted: Accepted) -> Accepted:
        if self._group is None:
            return accepted
        packed = self._first_ranks(torch.cat([accepted.tokens, accepted.accept_lens[:, None]], dim=1))
        tokens, lens = packed[:, :-1].contiguous(), packed[:, -1].contiguous()
        bonus = tokens.gather(1, lens[:, None].long() - 1)[:, 0].long()
        return replace(accepted, tokens=tokens, accept_lens=lens, bonus=bonus)

    def _first_ranks(self, values: Tensor) -> Tensor:
        if self._group is not None:
            self._group.broadcast(values, src=0)
        return values
