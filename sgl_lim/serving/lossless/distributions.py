"""What a token is drawn from: SGLang's sampling parameters, applied to several places of a request at once.

The steps and their order are those of SGLang's sampler in ordinary decoding (0.5.17 and 0.5.23):
`SamplingBatchInfo.apply_logits_bias` (penalties, grammar, logit bias), then `Sampler.forward` (temperature, softmax,
top-k, top-p, min-p). SGLang's own speculative algorithms apply penalties of the last place to all places of a run, and
know no min-p. Here the penalties at a place follow the drafts before it, so that each place has the distribution that
ordinary decoding would have after the same tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor


class Penalties(Protocol):
    """Penalties that depend on what a request has answered so far; see `penalties.RunPenalties`."""

    def apply(self, logits: Tensor, drafts: Tensor, first: int) -> None:
        """Change logits [B, n, V] of the places `first`, `first + 1`, … in place; `drafts` int64 [B, first + n - 1]."""


class TokenMask(Protocol):
    """A grammar's mask over all places of a batch; SGLang's `GrammarMask` is one."""

    def apply(self, logits: Tensor) -> None:
        """Set logits [B * n, V] of tokens that the grammar forbids to -inf, in place."""


@dataclass(frozen=True)
class Filters:
    """Which tokens of a distribution may be drawn at all."""

    top_ks: Tensor  # int32 [B]
    top_ps: Tensor  # float32 [B]
    min_ps: Tensor | None  # float32 [B]; None where no row has one
    flashinfer: bool = False
    """Whether SGLang samples with FlashInfer (`--sampling-backend`). PyTorch's sampler is the other one."""

    @property
    def in_turn(self) -> bool:
        """Whether top-p counts what top-k left, and not the whole distribution. FlashInfer's does, with min-p."""
        return self.flashinfer and self.min_ps is not None

    def keep(self, probs: Tensor) -> Tensor:
        """Probabilities [B, n, V] with zeros for what is cut; they need not sum to 1 then."""
        return self.keep_by_kernels(probs) if self.flashinfer and probs.is_cuda else self.keep_by_sorting(probs)

    def keep_by_sorting(self, probs: Tensor) -> Tensor:
        """`keep` in PyTorch. Sorting a vocabulary for each place takes a GPU milliseconds."""
        ranked, tokens = probs.sort(dim=-1, descending=True)
        ranks = torch.arange(probs.shape[-1], device=probs.device)
        kept = ranks < self.top_ks[:, None, None]
        mass = (ranked * kept).sum(-1, keepdim=True) if self.in_turn else 1.0
        before = ranked.cumsum(-1) - ranked
        kept = kept & (before <= self.top_ps[:, None, None] * mass)
        if self.min_ps is not None:
            kept &= ranked >= ranked[..., :1] * self.min_ps[:, None, None]
        return torch.zeros_like(probs).scatter_(-1, tokens, ranked * kept)

    def keep_by_kernels(self, probs: Tensor) -> Tensor:
        """`keep` by FlashInfer, which finds thresholds without sorting. CUDA alone."""
        from sglang.srt.layers.sampler import top_k_renorm_prob, top_p_renorm_prob

        places = probs.shape[1]
        flat = probs.flatten(0, 1).contiguous()
        top_ks, top_ps = self.top_ks.repeat_interleave(places), self.top_ps.repeat_interleave(places)
        most_likely = top_k_renorm_prob(flat, top_ks)
        if self.in_turn:
            kept = top_p_renorm_prob(most_likely, top_ps)
        else:
            kept = flat * ((most_likely > 0) & (top_p_renorm_prob(flat, top_ps) > 0))
        if self.min_ps is not None:
            least = flat.amax(-1, keepdim=True) * self.min_ps.repeat_interleave(places)[:, None]
            kept = kept * (flat >= least)
        return kept.view_as(probs)


@dataclass(frozen=True)
class SamplingRules:
    """How the tokens of B requests are drawn."""

    all_greedy: bool  # on the host
    greedy: Tensor | None  # bool [B]; None where no row is greedy
    temperatures: Tensor  # float32 [B, 1]
    filters: Filters | None = None
    """None where no row filters."""
    logit_bias: Tensor | None = None  # float32 [B, V]
    penalties: Penalties | None = None
    mask: TokenMask | None = None
    """Of all places that are verified. Drafts are drawn without it."""
    processors: Callable[[Tensor], None] | None = None
    """Custom logit processors, which change logits [B, V] in place. They may look at a request's answer so far, which
    has no drafts in it, so they go with a round without drafts alone."""
    drawn_acceptance: float | None = None
    """For benchmarks: drafts stay with this probability each, whatever the model says. Answers are wrong then."""

    @property
    def takes_tokens(self) -> bool:
        """Whether these rules can leave a place without a token. The host knows."""
        rules = (self.logit_bias, self.penalties, self.mask, self.processors)
        return any(rule is not None for rule in rules)

    def masked(self, mask: TokenMask | None) -> "SamplingRules":
        """The same rules under a grammar's mask."""
        return replace(self, mask=mask)

    def adjust(self, logits: Tensor, drafts: Tensor, first: int = 0) -> Tensor:
        """Apply penalties, grammar and bias in place.

        Args:
            logits: [B, n, V], of the places `first`, `first + 1`, … of each row's run.
            drafts: int64 [B, first + n - 1], tokens of the run after the one that was known before it.
            first: the first place in `logits`.

        Returns:
            `logits`.
        """
        if self.penalties is not None:
            self.penalties.apply(logits, drafts, first)
        if self.mask is not None:
            self.mask.apply(logits.flatten(0, 1))
        if self.logit_bias is not None:
            logits += self.logit_bias[:, None]
        if self.processors is not None:
            if drafts.shape[1]:
                raise ValueError(f"custom logit processors need a round without drafts, got {drafts.shape[1]}")
            self.processors(logits[:, 0])
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distributions float32 [B, n, V] of adjusted logits. In a greedy row the best token has all of it."""
        probs = (logits.float() / self.temperatures[:, :, None]).softmax(-1)
        if self.filters is not None:
            probs = self.filters.keep(probs)
            probs /= probs.sum(-1, keepdim=True)
        if self.greedy is None:
            return probs
        best = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(self.greedy[:, None, None], best, probs)


def rules_of(info: Any, penalties: Penalties | None = None, flashinfer: bool = False) -> SamplingRules:
    """Rules of a batch.

    Args:
        info: SGLang's `SamplingBatchInfo` of the batch.
        penalties: of the batch's rows, where one has any.
        flashinfer: whether SGLang samples with FlashInfer, whose top-p and min-p go in turn.
    """
    filters = None
    if info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling:
        min_ps = info.min_ps if info.need_min_p_sampling else None
        filters = Filters(info.top_ks, info.top_ps, min_ps, flashinfer)
    return SamplingRules(
        all_greedy=info.is_all_greedy,
        greedy=info.top_ks <= 1 if info.is_any_greedy else None,
        temperatures=info.temperatures,
        filters=filters,
        logit_bias=info.logit_bias,
        penalties=penalties,
        processors=partial(_run_processors, info) if info.has_custom_logit_processor else None,
    )


def compile_filters(device: torch.device | str) -> None:
    """Let FlashInfer compile what `Filters.keep` runs on a GPU. The first time takes it a minute on a machine."""
    one = torch.ones(1, dtype=torch.float32, device=device)
    filters = Filters(torch.full_like(one, 2, dtype=torch.int32), 0.9 * one, None, flashinfer=True)
    filters.keep(torch.full((1, 1, 64), 1 / 64, device=device))


def _run_processors(info: Any, logits: Tensor) -> None:
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    apply_custom_logit_processor(logits, info)
