"""What a set that one layer chooses covers of the attention of later layers, under full attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lim_kernels import Scaling
from sgl_lim.calibrate.search import Recall
from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.evaluate.pool import Pool
from sgl_lim.evaluate.step_rows import GRANULE, Rows
from sgl_lim.methods import HeadsOfRank
from sgl_lim.methods.ranked import Ranked
from sgl_lim.serving.layer import LayerInput, attend_with_logits
from sgl_lim.serving.reads import places_together, plan_reads


class CoveragePass:
    """Full attention of rows, in which every layer chooses the set that it would choose as a selection layer."""

    def __init__(self, rule: Ranked, pool: Pool, rows: Rows, *, heads: int, depth: int) -> None:
        self._rule, self._pool, self._rows, self._heads = rule, pool, rows, HeadsOfRank(0, heads, heads)
        self._plan = plan_reads(rule, rows.slots, rows.lens, together=places_together(heads), granule=GRANULE)
        self._sets: list[Tensor] = []
        self._beyond = rows.lens > rule.budget
        self.sums = torch.zeros(depth, depth, dtype=torch.float64, device=rows.ids.device)
        """[i, j], i <= j: what the set of layer i covers of layer j's attention, summed over rows beyond the budget."""

    @property
    def rows(self) -> int:
        """Rows beyond the budget."""
        return int(self._beyond.sum())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `sgl_lim.evaluate.step_rows.Pass`."""
        self._pool.store(layer, self._rows.own, k, v)
        keys, values = self._pool.of_layer(layer)
        operands = LayerInput(q[0].transpose(0, 1).contiguous(), keys, values, Scaling(scale))
        outs, sets, weights = [], [], []
        for scored in self._plan.select:
            out, lse, logits = attend_with_logits(scored, operands)
            lens = self._rows.lens[scored.rows]
            scores = self._rule.score(logits, lens, lse=lse, kv_heads=keys.shape[1], heads=self._heads)
            chosen, _ = self._rule.choose(scores, lens, None)
            chosen = chosen if self._rule.per_kv_head else chosen.unsqueeze(1)
            sets.append(chosen.masked_fill(chosen < 0, logits.shape[2]).long())
            weights.append(shares(logits, lse, lens, sets[-1].shape[1]))
            outs.append(out)
        self._sets.append(torch.cat(sets))
        covered = in_sets(torch.cat(weights), torch.stack(self._sets)) / self._heads.all
        self.sums[: layer + 1, layer] = covered.double().masked_fill(~self._beyond, 0.0).sum(1)
        return torch.cat(outs)[None]


def record(checkpoint: Checkpoint, pool: Pool, batches: Sequence[Rows], rule: Ranked) -> Recall:
    """Mean shares over all rows that are longer than the budget: [layers][layers], `[i][j]` for i <= j."""
    total, count = None, 0
    for rows in batches:
        if int(rows.lens.max()) <= rule.budget:
            continue
        one = CoveragePass(rule, pool, rows, heads=checkpoint.heads, depth=checkpoint.depth)
        checkpoint.run(rows, one)
        total, count = one.sums if total is None else total + one.sums, count + one.rows
    if total is None:
        raise ValueError(f"no context is longer than the budget {rule.budget}")
    return (total / count).tolist()


def shares(logits: Tensor, lse: Tensor, seq_lens: Tensor, groups: int) -> Tensor:
    """Attention that tokens get, summed over the query heads of each group: float32 [B, groups, L + 1], the last 0.

    Args:
        logits: float32 [B, H, L], undefined beyond `seq_lens[b]`; lse: float32 [B, H].
    """
    inside = torch.arange(logits.shape[2], device=logits.device) < seq_lens.unsqueeze(1)
    weights = (logits - lse.unsqueeze(2)).exp_().masked_fill_(~inside.unsqueeze(1), 0.0)
    by_group = weights.unflatten(1, (groups, -1)).sum(dim=2)
    return torch.nn.functional.pad(by_group, (0, 1))


def in_sets(weights: Tensor, sets: Tensor) -> Tensor:
    """Weight that lies in each set, summed over groups of heads: float32 [S, B].

    Args:
        weights: float32 [B, G, L + 1], as `shares`; sets: int64 [S, B, G, K], positions, each but L at most once.
    """
    by_set = weights.unsqueeze(0).expand(len(sets), -1, -1, -1)
    return by_set.gather(3, sets).sum(dim=(2, 3))
