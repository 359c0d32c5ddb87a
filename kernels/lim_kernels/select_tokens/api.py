"""Public entry of token selection: validates operands and dispatches.

`select_tokens` is the whole operator. It is the composition of `score_tokens` (heads to one score a token) and
`choose_tokens` (scores to positions), which are public because tensor parallelism reduces the scores between them.
"""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_rows
from lim_kernels.operands import SetSizes
from lim_kernels.select_tokens import reference

AGGREGATES = ("union", "max", "sum")


def score_tokens(
    logits: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    aggregate: str = "union",
    first_head: int = 0,
    num_heads: int | None = None,
    lse: Tensor | None = None,
    shallow: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """One score a token over all heads; a larger score is chosen first.

    Args:
        logits: float32 [B, H, L], raw scaled logits; anything at or beyond `seq_lens[b]` is ignored.
        seq_lens: int32 or int64 [B], each 1 … L.
        sizes: of the set.
        aggregate: "union" (rank-major union of the heads' top lists), or "max" / "sum" of the heads' softmax weights.
        first_head, num_heads: index of `logits[:, 0]` among all heads and how many heads there are, where this rank
            holds only some of them. Scores of ranks are combined by max for "union" and "max", by logsumexp for "sum".
        lse: float32 [B, H], each head's logarithm of its softmax denominator over the row, where it is known;
            "max" and "sum" compute it otherwise.
        shallow: the lists of "union" have a quarter of the middle budget, which suffices unless the heads of all ranks
            agree much. Once the scores of ranks are combined, `deepen_scores` tells, and completes them.

    Returns:
        float32 [B, L], defined in rows longer than the budget. For all their positions, sinks and window included,
        "max" gives the largest log-weight and "sum" the logarithm of the weights' sum. For candidates alone, "union"
        gives the negated place in the union, -inf where no head lists the token.
    """
    _check(logits, seq_lens, sizes, aggregate)
    op = "score_tokens"
    num_heads = logits.shape[1] + first_head if num_heads is None else num_heads
    if lse is not None:
        fits = lse.shape == logits.shape[:2] and lse.is_contiguous()
        require(fits, op, f"contiguous lse {list(logits.shape[:2])}", list(lse.shape))
    elif aggregate != "union":
        lse = reference.within_rows(logits, seq_lens).logsumexp(dim=2)
    score = implementation_of(reference.score_tokens, implementation, logits)
    return score(
        logits,
        lse,
        seq_lens,
        sizes,
        aggregate=aggregate,
        first_head=first_head,
        num_heads=num_heads,
        shallow=shallow,
    )


def deepen_scores(
    scores: Tensor,
    logits: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    first_head: int,
    num_heads: int,
    implementation: str | None = None,
) -> None:
    """Complete shallow scores of "union" in rows in which fewer candidates have a place than the middle budget.

    If as many have one, each of their places is exact, and every other candidate's is larger: nobody chooses it.

    Args:
        scores: float32 [B, L], by `score_tokens` with `shallow`, combined with those of other ranks; written.
        logits, seq_lens, sizes, first_head, num_heads: as they were given to `score_tokens`.

    Raises:
        ValueError: as `score_tokens`.
    """
    _check(logits, seq_lens, sizes, "union")
    check_scores("deepen_scores", scores, seq_lens, None)
    require(scores.shape[1] == logits.shape[2], "deepen_scores", f"scores of {logits.shape[2]}", scores.shape[1])
    deepen = implementation_of(reference.deepen_scores, implementation, logits)
    deepen(scores, logits, seq_lens, sizes, first_head=first_head, num_heads=num_heads)


def choose_tokens(
    scores: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    slots: Tensor | None = None,
    budgets: Tensor | None = None,
    recents: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sinks, the best-scored candidates and the recency window of each row; equal scores go to the lower position.

    Args:
        scores: float32 [B, L], larger is better; read for the candidates of rows longer than their budget.
        seq_lens: int32 or int64 [B].
        sizes: as in `score_tokens`.
        slots: int32 [B, L], KV slot of each position, to have the set in slots rather than in positions.
        budgets: int32 [B], each row's own budget, `sizes.budget` at most; None: it is that for all.
        recents: int32 [B], each row's own window instead of `sizes.recent`. In rows longer than their budget, sinks and
            window must fit into it. `adapt_budgets` gives both.

    Returns:
        positions int32 [B, K] with K = `sizes.budget`, ascending, -1 after `counts[b]`, or their slots in that order,
        0 after `counts[b]`; counts int32 [B], the row's length or its budget, whichever is less. A row no longer than
        its budget returns all it has.

    Raises:
        ValueError: wrong shape, dtype or device, or an unknown implementation.
    """
    op = "choose_tokens"
    check_scores(op, scores, seq_lens, slots)
    for name, own in (("budgets", budgets), ("recents", recents)):
        if own is not None:
            fits = own.dtype == torch.int32 and own.shape == seq_lens.shape and own.device == scores.device
            require(fits, op, f"{name} int32 {list(seq_lens.shape)} on {scores.device}", _describe(own))
            require_rows(op, own)
    choose = implementation_of(reference.choose_tokens, implementation, scores)
    return choose(
        scores,
        seq_lens,
        sizes,
        slots=slots,
        budgets=budgets,
        recents=recents,
    )


def select_tokens(
    logits: Tensor,
    seq_lens: Tensor,
    *,
    budget: int,
    recent: int,
    sinks: int,
    aggregate: str = "union",
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The set of tokens that sparse layers attend to, one set a row for all heads.

    Args:
        budget, recent, sinks: as in `SetSizes`. The other arguments and results are as in `score_tokens` and
            `choose_tokens`.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown aggregate or implementation, or a budget that does not
            cover sinks and window.
    """
    sizes = SetSizes(budget, recent, sinks)
    scores = score_tokens(logits, seq_lens, sizes, aggregate=aggregate, implementation=implementation)
    return choose_tokens(scores, seq_lens, sizes, implementation=implementation)


def check_scores(op: str, scores: Tensor, seq_lens: Tensor, slots: Tensor | None) -> None:
    """Check what operators that choose by scores take. Raises ValueError."""
    require(scores.dim() == 2 and scores.dtype == torch.float32, op, "scores float32 [B, L]", _describe(scores))
    require(scores.shape[1] < 1 << 22, op, "fewer than 4,194,304 positions", scores.shape[1])
    require(seq_lens.shape == scores.shape[:1], op, f"seq_lens [{scores.shape[0]}]", list(seq_lens.shape))
    require_rows(op, scores, seq_lens, slots)
    if slots is not None:
        fits = slots.dtype == torch.int32 and slots.shape == scores.shape
        require(fits, op, f"slots int32 {list(scores.shape)}", _describe(slots))


def _check(logits: Tensor, seq_lens: Tensor, sizes: SetSizes, aggregate: str) -> None:
    op = "select_tokens"
    require(logits.dim() == 3 and logits.dtype == torch.float32, op, "logits float32 [B, H, L]", _describe(logits))
    require(
        seq_lens.dim() == 1 and seq_lens.shape[0] == logits.shape[0] and not seq_lens.is_floating_point(),
        op,
        f"seq_lens integer [{logits.shape[0]}]",
        _describe(seq_lens),
    )
    require(seq_lens.device == logits.device, op, f"seq_lens on {logits.device}", seq_lens.device)
    sizes.check(op)
    require_rows(op, logits, seq_lens)
    require(aggregate in AGGREGATES, op, f"aggregate in {AGGREGATES}", repr(aggregate))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
