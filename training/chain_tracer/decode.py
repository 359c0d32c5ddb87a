"""Teacher-forced evaluation in which every solution row is its own decode step under a sparse-decode policy.

All argmaxes right here is the same event as greedy generation writing the whole chain right, but the rows of many
chains run at once. Prompt rows are dense whatever the policy, so one prefill serves all policies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels import SetSizes, adapt_budgets, choose_tokens, score_tokens
from sgl_lim.tasks.chains import ChainProblem

from .data import BOS, EOS, IDS
from .model import ChainTracer, finish, project, rope_table

DENSE_LAYERS = 2  # of the window-only baseline


@dataclass(frozen=True)
class Policy:
    """What a decode row may attend to. `method` is "full", "lessismore" or "window".

    A window with selection layers leaves those layers full and keeps no set: what the sets add is measured against it.
    """

    method: str
    budget: int = 0
    selection: tuple[int, ...] = ()
    aggregate: str = "union"
    recency: float | None = 0.25
    """None: windows get the share of the budget that they hold of the attention."""
    top_p: float | None = None
    """Share of the attention that sets hold, with as few tokens as do; None: they have the whole budget."""

    @property
    def dense_below(self) -> int:
        return min(self.selection) if self.selection else DENSE_LAYERS

    @property
    def middle(self) -> int:
        recency = 0.5 if self.recency is None else self.recency
        return int(self.budget * (1 - recency)) if self.method == "lessismore" else 0

    @property
    def sinks(self) -> int:
        return 4 if self.budget - self.middle >= 4 else 0

    @property
    def recent(self) -> int:
        return self.budget - self.middle - self.sinks


@dataclass(frozen=True)
class Prefilled:
    """A batch of equally long problems after its dense prefill."""

    keys: list[Tensor]  # per layer [B, kv_heads, P, D]
    values: list[Tensor]
    last: Tensor  # [B, hidden]: residual stream of the prompt's last word
    solution: Tensor  # int64 [B, S]: solution words and `<eos>`


@dataclass
class Reads:
    """Tokens that the decode steps of some chains read, in all layers."""

    attended: int = 0
    dense: int = 0
    """The same without a policy."""


def encode(problems: list[ChainProblem], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids int64 of prompts [B, P] with `<bos>` and of solutions [B, S] with `<eos>`."""
    prompts = [[BOS] + [IDS[w] for w in p.prompt.split()] for p in problems]
    solutions = [[IDS[w] for w in p.solution.split()] + [EOS] for p in problems]
    return torch.tensor(prompts, device=device), torch.tensor(solutions, device=device)


@torch.inference_mode()
def prefill(model: ChainTracer, problems: list[ChainProblem]) -> Prefilled:
    """Dense causal pass over the prompts of problems of one size."""
    prompts, solution = encode(problems, model.embed.device)
    x = model.embed[prompts]
    cos, sin = rope_table(torch.arange(prompts.shape[1], device=x.device), model.shape)
    keys, values = [], []
    for i in range(model.shape.layers):
        w = model.weights(i)
        q, k, v = project(x, w, cos, sin, model.shape, model.dtype)
        keys.append(k)
        values.append(v)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = finish(x, attended, w, model.shape, model.dtype)
    return Prefilled(keys, values, x[:, -1], solution)


@torch.inference_mode()
def score(model: ChainTracer, batch: Prefilled, policy: Policy, reads: Reads | None = None) -> Tensor:
    """bool [B, S]: which solution words (`<eos>` included) the policy's argmax gets right. Adds to `reads`."""
    fed = batch.solution[:, :-1]
    before = batch.keys[0].shape[2]
    positions = torch.arange(before, before + fed.shape[1], device=fed.device)
    cos, sin = rope_table(positions, model.shape)
    # [S - 1, L]
    causal = torch.arange(before + fed.shape[1], device=fed.device) <= positions[:, None]
    visible = _window(causal, positions, policy) if policy.method == "window" else causal
    x = model.embed[fed]
    for i in range(model.shape.layers):
        w = model.weights(i)
        q, k, v = project(x, w, cos, sin, model.shape, model.dtype)
        k, v = torch.cat((batch.keys[i], k), dim=2), torch.cat((batch.values[i], v), dim=2)
        sparse = i >= policy.dense_below and i not in policy.selection and policy.method != "full"
        mask = visible if sparse else causal
        if reads is not None:
            reads.attended += int(mask.sum()) * (len(fed) if mask.ndim == 2 else 1)
            reads.dense += int(causal.sum()) * len(fed)
        attended = _attend(q, k, v, mask)
        if i in policy.selection and policy.method == "lessismore":
            visible = _select(q, k, positions + 1, policy, model.shape.scale)
        x = finish(x, attended, w, model.shape, model.dtype)
    rows = torch.cat((batch.last[:, None], x), dim=1)
    return model.logits(rows).argmax(-1) == batch.solution


def _window(causal: Tensor, positions: Tensor, policy: Policy) -> Tensor:
    column = torch.arange(causal.shape[1], device=causal.device)
    return causal & ((column < policy.sinks) | (column > positions[:, None] - policy.recent))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    mask = visible if visible.ndim == 2 else visible[:, None]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _select(q: Tensor, k: Tensor, seq_lens: Tensor, policy: Policy, scale: float, rows: int = 4096) -> Tensor:
    """bool [B, S, L]: each row's set, chosen from the float32 logits of all heads in chunks of at most `rows`."""
    batch, heads, count, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    visible = torch.zeros(batch, count, length + 1, dtype=torch.bool, device=q.device)
    step = max(1, rows // count)
    for i in range(0, batch, step):
        wide = k[i : i + step].float().repeat_interleave(group, dim=1)
        logits = (q[i : i + step].float() @ wide.transpose(2, 3) * scale).transpose(1, 2).flatten(0, 1)
        lens = seq_lens.repeat(len(wide)).to(torch.int32)
        sizes = SetSizes(policy.budget, policy.recent, policy.sinks)
        scores = score_tokens(logits.contiguous(), lens, sizes, aggregate=policy.aggregate)
        budgets = recents = None
        if policy.top_p is not None or policy.recency is None:
            find_recent = policy.recency is None
            budgets, recents = adapt_budgets(scores, lens, sizes, find_recent=find_recent, top_p=policy.top_p)
        positions, _ = choose_tokens(scores, lens, sizes, budgets=budgets, recents=recents)
        index = positions.long().masked_fill(positions < 0, length).view(len(wide), count, -1)
        visible[i : i + step].scatter_(2, index, True)
    return visible[..., :length]
