"""What runs inside the backend while a model is calibrated: dense decode that measures what sets would have covered.

At each decode step every layer attends to everything, chooses the set that it would choose as a selection layer, for
each budget, and adds up which share of its own attention lies in the sets of the layers before it and in its own.
Nothing is sparse and nothing outlives a step but the sums, which stay on the device until somebody asks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lim_kernels import decode_with_scores
from sgl_lim.methods import HeadsOfRank
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.layer import CombineRanks, LayerInput
from sgl_lim.serving.reads import Plan, score_together


class Recorder:
    """Sums of covered attention by budget, by the layer that chose and by the layer that would have read.

    Args:
        rules: the method under calibration, once a budget; budgets increase, scope and aggregate are the same.
        num_layers: of the model, which run in order from 0 in every step.
        heads: this rank's query heads; combine_ranks: None where these are all. Every rank of a tensor-parallel group
            comes to the sums over all heads.
        device: of the KV pool.
    """

    def __init__(
        self,
        rules: Sequence[Ranked],
        num_layers: int,
        heads: HeadsOfRank,
        combine_ranks: CombineRanks | None,
        device: torch.device | str,
    ) -> None:
        self._rules, self._num_layers, self._heads, self._combine_ranks = tuple(rules), num_layers, heads, combine_ranks
        self._sums = torch.zeros(len(rules), num_layers, num_layers, dtype=torch.float64, device=device)
        self._rows = torch.zeros(len(rules), dtype=torch.int64, device=device)
        self._plan: Plan | None = None
        self._next_layer = 0
        # By index of a rule whose budget some row of the step exceeds: int64 [layers, B, 1 or H_kv, K] positions.
        self._sets: dict[int, Tensor] = {}

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets recorded."""
        return tuple(rule.budget for rule in self._rules)

    def read(self) -> dict[str, Any]:
        """Builtins: `budgets` [n]; `rows` [n], decoded rows longer than each; `sums` [n][layers][layers], of which
        `[b][i][j] / rows[b]` is the mean share of layer j's attention that the set of layer i covers, i <= j.

        Waits for the device.
        """
        return {"budgets": list(self.budgets), "rows": self._rows.tolist(), "sums": self._sums.tolist()}

    def attend(self, layer: int, plan: Plan, operands: LayerInput) -> Tensor:
        """Full attention of one layer, recorded; layers come from 0, in order within a step.

        Returns:
            [B, H, D_v] in q's dtype.

        Raises:
            RuntimeError: inside a CUDA graph, which would replay without recording, or layers out of order.
        """
        q, k_cache, v_cache, scaling = operands.q, operands.k_cache, operands.v_cache, operands.scaling
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "recording cannot be captured in a CUDA graph; start with --cuda-graph-backend-decode disabled"
            )
        self._enter(layer, plan, k_cache.shape[1])
        slots, smallest, outs = plan.context.slots, self._rules[0].budget, []
        for rows in score_together(len(q), slots.shape[1], q.shape[1]):
            lens = plan.seq_lens[rows]
            out, lse, logits = decode_with_scores(
                q[rows], k_cache, v_cache, slots[rows], lens, scaling, score_beyond=smallest
            )
            outs.append(out)
            if self._sets:
                self._record(layer, rows, lens, logits, lse, k_cache.shape[1])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _enter(self, layer: int, plan: Plan, kv_heads: int) -> None:
        """Check that layers come in order, and make room for the sets of a new step."""
        if layer == 0:
            self._plan, self._next_layer, self._sets = plan, 0, {}
            batch, longest = plan.context.slots.shape
            for index, rule in enumerate(self._rules):
                if rule.budget < longest:
                    self._rows[index] += (plan.seq_lens > rule.budget).sum()
                    shape = (self._num_layers, batch, kv_heads if rule.per_kv_head else 1, rule.budget)
                    self._sets[index] = torch.zeros(shape, dtype=torch.int64, device=plan.context.slots.device)
        if plan is not self._plan or layer != self._next_layer:
            raise RuntimeError(f"layer {layer} ran where layer {self._next_layer} of the same step was to be recorded")
        self._next_layer += 1

    def _record(self, layer: int, rows: slice, lens: Tensor, logits: Tensor, lse: Tensor, kv_heads: int) -> None:
        """Choose the sets of some rows at this layer and add what the sets so far cover of its attention."""
        weights = shares(logits, lse, lens, kv_heads)
        for index, sets in self._sets.items():
            rule = self._rules[index]
            sets[layer, rows] = self._choose(rule, lens, logits, lse, kv_heads)
            # [b, 1 or H_kv, L + 1]
            by_set = weights if rule.per_kv_head else weights.sum(dim=1, keepdim=True)
            covered = self._over_ranks(in_sets(by_set, sets[: layer + 1, rows]))
            # Other rows need not have logits.
            covered = covered.double().masked_fill(lens <= rule.budget, 0.0)
            self._sums[index, : layer + 1, layer] += covered.sum(dim=1)

    def _choose(self, rule: Ranked, lens: Tensor, logits: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        """int64 [b, 1 or H_kv, K]: positions that the rule takes, L where it takes fewer than K."""
        scores = rule.score(logits, lens, lse=lse, kv_heads=kv_heads, heads=self._heads)
        if self._combine_ranks is not None and rule.rank_reduction is not None:
            scores = self._combine_ranks(scores, rule.rank_reduction)
        positions, _ = rule.choose(scores, lens, None)
        positions = positions if rule.per_kv_head else positions.unsqueeze(1)
        return positions.masked_fill(positions < 0, logits.shape[2]).long()

    def _over_ranks(self, covered: Tensor) -> Tensor:
        """Sums over this rank's heads [S, b] as means over all heads."""
        combine = self._combine_ranks
        # Ranks can only combine by max or logsumexp.
        total = covered if combine is None else combine(covered.log(), "logsumexp").exp()
        return total / self._heads.all


def shares(logits: Tensor, lse: Tensor, seq_lens: Tensor, kv_heads: int) -> Tensor:
    """Attention that tokens get, summed over the query heads of each KV head: float32 [B, H_kv, L + 1], the last 0.

    Args:
        logits: float32 [B, H, L], undefined beyond `seq_lens[b]`; lse: float32 [B, H].
    """
    inside = torch.arange(logits.shape[2], device=logits.device) < seq_lens.unsqueeze(1)
    weights = (logits - lse.unsqueeze(2)).exp_().masked_fill_(~inside.unsqueeze(1), 0.0)
    by_head = weights.unflatten(1, (kv_heads, -1)).sum(dim=2)
    return torch.nn.functional.pad(by_head, (0, 1))


def in_sets(weights: Tensor, sets: Tensor) -> Tensor:
    """Weight that lies in each set, summed over groups of heads: float32 [S, B].

    Args:
        weights: float32 [B, G, L + 1], as `shares`; sets: int64 [S, B, G, K], positions, each but L at most once.
    """
    by_set = weights.unsqueeze(0).expand(len(sets), -1, -1, -1)
    return by_set.gather(3, sets).sum(dim=(2, 3))
