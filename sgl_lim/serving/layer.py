"""What one layer of a decode step does: it takes its read, calls one operator and, if it selects, chooses a set."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lim_kernels import Scaling, decode_with_scores, grouped_decode, score_context, sparse_decode
from lim_kernels.block_gates import GatedBlocks
from lim_kernels.page_bounds import PageBounds
from sgl_lim.methods import CombineRanks, HeadsOfRank, Method, Role
from sgl_lim.serving.kept_sets import KeptSets
from sgl_lim.serving.ranks import RankExchange
from sgl_lim.serving.reads import Plan, Read, ScoredRead, places_together


@dataclass(frozen=True)
class LayerInput:
    """What a layer brings to attention."""

    q: Tensor  # [B, H, D]
    k_cache: Tensor  # [num_slots, H_kv, D], current token stored
    v_cache: Tensor  # [num_slots, H_kv, D_v], current token stored
    scaling: Scaling
    pages: PageBounds | GatedBlocks | None = None  # of layers that choose for themselves, current token learnt


@dataclass(frozen=True)
class LayerDecode:
    """Decodes layers by a plan of reads; what stays the same over all steps.

    Attributes:
        heads: this rank's query heads.
        combine_ranks: None where no other rank has heads that choose the same set.
        kept_sets: where sets outlive a step; needed if the plan's `kept` is there.
        score_bytes: that a selection layer's logits may take; None: `reads.SCORE_BYTES`.
    """

    method: Method
    heads: HeadsOfRank
    combine_ranks: CombineRanks | None = None
    kept_sets: KeptSets | None = None
    score_bytes: int | None = None

    @property
    def together(self) -> int:
        """How many places of rows are scored at once."""
        return places_together(self.heads.own, self.score_bytes)

    def run(self, plan: Plan, role: Role, layer: LayerInput) -> Tensor:
        """Attention of one layer, [B, H, D_v] in q's dtype; a layer that chooses a set also puts it in force.

        Raises:
            RuntimeError: a sparse layer ran before any set was in force, or a layer knows of no pages to choose among.
        """
        if role is Role.DENSE:
            return attend(plan.dense, layer)
        if role is Role.SPARSE:
            if plan.chosen is None:
                raise RuntimeError("a sparse layer ran before a selection layer of the same step")
            return attend(plan.chosen, layer)
        if plan.placed is not None:
            plan.chosen = next(plan.placed)
            return attend(plan.chosen, layer)
        if not plan.select:
            # No row can exceed the budget: the set is the whole context, and nobody asks for logits.
            plan.chosen = Read(plan.context.slots, plan.context.ends)
            return attend(plan.context, layer)
        if role is Role.OWN:
            if layer.pages is None:
                raise RuntimeError(
                    f"method {self.method.name} chooses by what is known of pages, and nothing was given"
                )
            slots, lens = plan.context.slots, plan.context.ends
            plan.chosen = Read(*self.method.choose_own(layer.q, layer.pages, slots, lens, self.combine_ranks))
            return attend(plan.chosen, layer)
        return self._select(plan, layer)

    def _select(self, plan: Plan, layer: LayerInput) -> Tensor:
        """A selection layer: it scores what it reads, puts a set in force, and attends to that or to what it read."""
        if self.method.selection_attends == "set":
            plan.chosen = self._choose(plan, self.scores(plan, layer))
            return attend(plan.chosen, layer)
        outs, scores = [], []
        for scored in plan.select:
            out, lse, logits = attend_with_logits(scored, layer)
            outs.append(out)
            scores.append(self._over_ranks(plan, scored.rows, logits, lse, layer.k_cache.shape[1]))
            # The logits' memory serves the next rows.
            del logits
        # Rows that choose together need not have been scored together, and scores are few beside logits.
        plan.chosen = self._choose(plan, self._over_ranks_of_groups(plan, _together(scores)))
        return _together(outs)

    def choose_positions(self, plan: Plan, layer: LayerInput) -> tuple[Tensor, Tensor]:
        """The sets of a selection layer by its keys alone, in positions; nothing is put in force.

        Args:
            plan: whose `select` says what is scored.

        Returns:
            As `Method.choose`: int32 [B, K], or [B, H_kv, K], and counts.
        """
        return self.method.choose(self.scores(plan, layer), plan.choose_lens, None, plan.shared)

    def scores(self, plan: Plan, layer: LayerInput) -> Tensor:
        """The scores of all rows of a step's selection, float32 [B, L] or [B, H_kv, L], by keys alone."""
        scores = []
        for scored in plan.select:
            lse, logits = score_keys(scored, layer)
            scores.append(self._over_ranks(plan, scored.rows, logits, lse, layer.k_cache.shape[1]))
            del logits
        return self._over_ranks_of_groups(plan, _together(scores))

    def _over_ranks(self, plan: Plan, rows: slice, logits: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        """The scores of rows by which they choose, over all ranks that must choose the same.

        Those of rows that choose in groups are this rank's own where the best of each rank suffice: which these are,
        all rows of a group tell together.
        """
        method, lens, in_groups = self.method, plan.choose_lens[rows], plan.shared is not None
        exchange = self._exchange_of_best(plan)
        # How deep lists have to be shows once those of all ranks are there.
        shallow = exchange is not None and not in_groups and method.deepens
        scores = method.score(logits, lens, lse=lse, kv_heads=kv_heads, heads=self.heads, shallow=shallow)
        if self.combine_ranks is None or method.rank_reduction is None:
            return scores
        if exchange is None:
            return self.combine_ranks(scores, method.rank_reduction)
        if not in_groups:
            exchange.best(scores, method.choose(scores, lens, None)[0])
        if shallow:
            method.deepen(scores, logits, lens, kv_heads=kv_heads, heads=self.heads)
            exchange.best(scores, method.choose(scores, lens, None)[0])
        return scores

    def _over_ranks_of_groups(self, plan: Plan, scores: Tensor) -> Tensor:
        """Scores of all rows as `_over_ranks` gave them, over all ranks where rows choose in groups too."""
        exchange = self._exchange_of_best(plan)
        if exchange is not None and plan.shared is not None:
            exchange.best(scores, self.method.choose(scores, plan.choose_lens, None, plan.shared)[0])
        return scores

    def _exchange_of_best(self, plan: Plan) -> RankExchange | None:
        """What exchanges the best tokens of each rank; None where ranks need whole rows, or these are told sooner."""
        exchange = self.combine_ranks
        if not isinstance(exchange, RankExchange) or not self.method.best_suffice:
            return None
        rows, width = plan.context.slots.shape
        return exchange if exchange.pays(rows, width, self.method.budget) else None

    def _choose(self, plan: Plan, scores: Tensor) -> Read:
        """The set that a selection layer puts in force."""
        kept, store = plan.kept, self.kept_sets
        if kept is not None and store is not None and store.keeps(kept):
            # Sets that outlive the step are kept in positions.
            positions, _ = self.method.choose(scores, plan.choose_lens, None, plan.shared)
            return Read(*store.keep(kept, positions, plan.seq_lens))
        slots, counts = self.method.choose(scores, plan.choose_lens, plan.context.slots, plan.shared)
        return Read(slots, counts, plan.set_groups)


def attend(read: Read, layer: LayerInput) -> Tensor:
    """Attention over a read, [B, H, D_v]."""
    return attend_with_lse(read, layer)[0]


def attend_with_lse(read: Read, layer: LayerInput) -> tuple[Tensor, Tensor]:
    """Attention over a read: out [B, H, D_v], and lse float32 [B, H]."""
    if read.groups is not None:
        out, lse, _ = grouped_decode(
            layer.q, layer.k_cache, layer.v_cache, read.slots, read.ends, read.groups, layer.scaling
        )
        return out, lse
    scaling = layer.scaling
    return sparse_decode(
        layer.q,
        layer.k_cache,
        layer.v_cache,
        read.slots,
        read.ends,
        scale=scaling.scale,
        logit_cap=scaling.logit_cap,
        k_scale=scaling.k_scale,
        v_scale=scaling.v_scale,
    )


def attend_with_logits(scored: ScoredRead, layer: LayerInput) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over a read of some rows: out [b, H, D_v], lse float32 [b, H], logits float32 [b, H, L] by position."""
    read, q = scored.read, layer.q[scored.rows]
    if read.groups is None:
        return decode_with_scores(
            q, layer.k_cache, layer.v_cache, read.slots, read.ends, layer.scaling, score_beyond=scored.score_beyond
        )
    out, lse, logits = grouped_decode(
        q,
        layer.k_cache,
        layer.v_cache,
        read.slots,
        read.ends,
        read.groups,
        layer.scaling,
        scored=True,
        score_beyond=scored.score_beyond,
    )
    assert logits is not None
    return out, lse, logits[:, :, scored.set_places :]


def score_keys(scored: ScoredRead, layer: LayerInput) -> tuple[Tensor, Tensor]:
    """The keys of a read of some rows: lse float32 [b, H], logits float32 [b, H, L] by position."""
    read = scored.read
    lse, logits = score_context(
        layer.q[scored.rows],
        layer.k_cache,
        read.slots,
        read.ends,
        layer.scaling,
        groups=read.groups,
        score_beyond=scored.score_beyond,
    )
    return lse, logits[:, :, scored.set_places :]


def _together(parts: list[Tensor]) -> Tensor:
    """The rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
