"""Which drafts are kept, and the token after them, so that answers are distributed as in ordinary decoding.

Rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). A draft d that was
drawn from q stays with probability min(1, p(d) / q(d)). The first draft that does not stay is replaced by a token from
what p has over q, max(p - q, 0). If all stay, one more token is drawn from p. What comes out is distributed as p,
whatever q is. A greedy row is the case in which p has one token.

Everything runs on the device, in shapes that depend on the batch and the number of drafts alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_patches.no_token_left import make_choosable
from sgl_lim.serving.lossless.distributions import SamplingRules


@dataclass(frozen=True)
class Accepted:
    """What B rows answer in one round of k drafts."""

    tokens: Tensor
    """int32 [B, k + 1]: drafts that stay, the token after them, then zeros."""
    accept_lens: Tensor
    """int32 [B] in 1 … k + 1: how many of `tokens` count."""
    bonus: Tensor
    """int64 [B], the last token that counts. It has no KV yet."""
    none_left: Tensor | None = None
    """bool [B, k + 1], places at which the model could choose no token; None where nobody had to look."""

    @property
    def without_token(self) -> Tensor | None:
        """bool [B]: where the last token that counts was chosen from nothing, so that the answer ends before it."""
        if self.none_left is None:
            return None
        return self.none_left.gather(1, self.accept_lens[:, None].long() - 1)[:, 0]


def accept(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    sampling: SamplingRules,
    generator: torch.Generator | None = None,
) -> Accepted:
    """Verify the drafts of a batch. With k = 0 it draws one token a row.

    Args:
        target_logits: [B, k + 1, V], raw logits of the dense model at each place. They are changed in place: afterwards
            penalties, grammar and bias are in them, as SGLang's log-probabilities want them. Places that leave no
            token are uniform, and no draft stays there.
        draft_tokens: int64 [B, k].
        draft_probs: float32 [B, k, V], what the drafts were drawn from; None if they were not drawn.
        sampling: the rules of the batch.
        generator: of the random numbers; None for torch's own.
    """
    sampling.adjust(target_logits, draft_tokens)
    looks = sampling.takes_tokens or target_logits.device.type == "cpu"
    none_left = make_choosable(target_logits) if looks else None
    if sampling.all_greedy:
        best = target_logits.argmax(-1)
        if not draft_tokens.shape[1]:
            # A dense step must cost what it costs elsewhere, so it launches no more than it needs.
            return Accepted(best.int(), torch.ones_like(best[:, 0], dtype=torch.int32), best[:, 0], none_left)
        stays = _possible(_or_drawn(best[:, :-1] == draft_tokens, sampling, generator), none_left)
        return _accepted(draft_tokens, stays, best, none_left)
    probs = sampling.probabilities(target_logits)
    p = probs[:, :-1].gather(2, draft_tokens[:, :, None])[:, :, 0]
    q = torch.ones_like(p) if draft_probs is None else draft_probs.gather(2, draft_tokens[:, :, None])[:, :, 0]
    # A uniform number is below 1, so a draft with p >= q always stays.
    stays = torch.rand(p.shape, device=p.device, generator=generator) * q < p
    stays = _possible(_or_drawn(stays, sampling, generator), none_left)
    last = draw(_after(probs, draft_tokens, draft_probs, _kept(stays)), generator)
    return _accepted(draft_tokens, stays, last[:, None].expand(-1, probs.shape[1]), none_left)


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, int64 [B], with probabilities in proportion to weights float32 [B, V].

    The largest of weights over exponential numbers is distributed so, and needs no wait for the device, unlike
    `torch.multinomial`.
    """
    exponential = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / exponential.clamp_min_(torch.finfo(weights.dtype).tiny)).argmax(-1)


def _or_drawn(stays: Tensor, sampling: SamplingRules, generator: torch.Generator | None) -> Tensor:
    """`stays` bool [B, k], or chance instead where a benchmark wants it."""
    if sampling.drawn_acceptance is None:
        return stays
    return torch.rand(stays.shape, device=stays.device, generator=generator) < sampling.drawn_acceptance


def _possible(stays: Tensor, none_left: Tensor | None) -> Tensor:
    """`stays` bool [B, k] without drafts at places that leave no token; `none_left` as in `Accepted`."""
    return stays if none_left is None else stays & ~none_left[:, :-1]


def _kept(stays: Tensor) -> Tensor:
    """int64 [B], drafts before the first that does not stay; `stays` bool [B, k]."""
    return stays.long().cumprod(1).sum(1)


def _after(probs: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None, kept: Tensor) -> Tensor:
    """Weights [B, V] of the token after the drafts that stay."""
    places, drafts = kept[:, None, None], draft_tokens.shape[1]
    here = probs.take_along_dim(places, 1)[:, 0]
    if not drafts:
        return here
    at = places.clamp_max(drafts - 1)
    if draft_probs is None:
        drafted = torch.zeros_like(here).scatter_(1, draft_tokens.gather(1, at[:, :, 0]), 1.0)
    else:
        drafted = draft_probs.take_along_dim(at, 1)[:, 0]
    over = (here - drafted).clamp_min_(0)
    # Where rounding alone rejected a draft, p has nothing over q. Then p = q but for rounding.
    replaced = (kept[:, None] < drafts) & (over.sum(1, keepdim=True) > 0)
    return torch.where(replaced, over, here)


def _accepted(draft_tokens: Tensor, stays: Tensor, after: Tensor, none_left: Tensor | None = None) -> Accepted:
    """The round's answer: `after` int64 [B, k + 1] is the token after the drafts, if it comes at that place."""
    kept = _kept(stays)
    places = torch.arange(after.shape[1], device=after.device)
    drafts = torch.nn.functional.pad(draft_tokens, (0, 1))
    tokens = torch.where(places < kept[:, None], drafts, 0)
    bonus = after.gather(1, kept[:, None])
    tokens = torch.where(places == kept[:, None], bonus, tokens)
    return Accepted(tokens.int(), (kept + 1).int(), bonus[:, 0], none_left)
