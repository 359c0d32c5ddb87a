"""Teacher-forced decode over a served step's operators: `sgl_lim.serving.layer` with any method of `sgl_lim.methods`.

The prompt is dense, as a server's prefill. Every later token is its own decode step: it sees the keys and values that
the steps before it left, which sparse layers have shaped. As the tokens are given, many steps run as rows of one.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels import Scaling, decode_with_scores
from lim_kernels.block_gates import Rotation
from sgl_lim.evaluate.own_pages import OwnPages, own_pages
from sgl_lim.evaluate.step_rows import share_read
from sgl_lim.gates.rotation import plain_table
from sgl_lim.gates.weights import ModelShape
from sgl_lim.methods import HeadsOfRank, Method, Role
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.model_rotation import LayerRotation
from sgl_lim.serving.reads import Plan, places_together, plan_reads

from .model import SmallQwen3, finish, project, rope_table


@dataclass(frozen=True)
class Context:
    """What a sequence has in the cache."""

    keys: list[Tensor]  # per layer [P, kv_heads, D]
    values: list[Tensor]  # per layer [P, kv_heads, D]
    last: Tensor  # [1, hidden]: residual stream of the last token

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.keys[0])


@dataclass(frozen=True)
class Decoded:
    """What the steps of one sequence found."""

    logits: Tensor  # float32 [S, vocab]: of the token after each one fed
    attended: Tensor  # float32 [S]: share of their context that sparse layers read, mean over them; 1 if there are none
    read: Tensor  # float32 [S]: tokens that a layer reads, mean over all layers
    recall: (
        Tensor | None
    )  # float32 [S]: share of the full attention's weight that the sets hold, mean over sparse layers

    @staticmethod
    def join(parts: list["Decoded"]) -> "Decoded":
        """Later steps behind earlier ones."""
        recalls = [p.recall for p in parts if p.recall is not None]
        return Decoded(
            torch.cat([p.logits for p in parts]),
            torch.cat([p.attended for p in parts]),
            torch.cat([p.read for p in parts]),
            torch.cat(recalls) if recalls else None,
        )


@torch.inference_mode()
def prefill(model: SmallQwen3, tokens: Tensor) -> Context:
    """Dense causal pass over one sequence of token ids [P]."""
    x = model.embed[tokens][None]
    cos, sin = rope_table(torch.arange(len(tokens), device=x.device), model.shape)
    keys, values = [], []
    for i in range(model.shape.layers):
        w = model.weights(i)
        q, k, v = project(x, w, cos, sin, model.shape, model.dtype)
        keys.append(k[0].transpose(0, 1).contiguous())
        values.append(v[0].transpose(0, 1).contiguous())
        x = finish(
            x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), w, model.shape, model.dtype
        )
    return Context(keys, values, x[0, -1:])


@torch.inference_mode()
def decode(
    model: SmallQwen3, context: Context, fed: Tensor, method: Method, *, rows: int = 128, recall: bool = False
) -> Decoded:
    """Feed tokens [S] behind a context under a method, `rows` steps at once; `recall` costs a full pass a layer."""
    parts, pages = [], pages_of(model, method, context.length + len(fed))
    for first in range(0, len(fed), rows):
        context, part = _decode_rows(model, context, fed[first : first + rows], method, pages, recall)
        parts.append(part)
    return Decoded.join(parts)


def pages_of(model: SmallQwen3, method: Method, positions: int) -> OwnPages | None:
    """What layers choose by that choose for themselves, in contexts of so many tokens; None where none does."""
    shape, device = model.shape, model.embed.device
    table = plain_table(shape.rope_theta, shape.head_dim, positions).to(device)
    turned = LayerRotation(Rotation(table), shape.rope_theta)
    of_model = ModelShape(shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    return own_pages(method, of_model, turned, model.dtype, device)


def _decode_rows(
    model: SmallQwen3, context: Context, fed: Tensor, method: Method, pages: OwnPages | None, recall: bool
) -> tuple[Context, Decoded]:
    shape, before = model.shape, context.length
    positions = torch.arange(before, before + len(fed), device=fed.device)
    cos, sin = rope_table(positions, shape)
    slots = torch.arange(before + len(fed), device=fed.device, dtype=torch.int32).repeat(len(fed), 1)
    plan = plan_reads(method, slots, (positions + 1).to(torch.int32), together=places_together(shape.heads))
    layers, scaling = LayerDecode(method, HeadsOfRank(0, shape.heads, shape.heads)), Scaling(shape.scale)
    x, keys, values = model.embed[fed][None], [], []
    shares, recalls = [], []
    for i, role in enumerate(method.layer_roles(shape.layers)):
        w = model.weights(i)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in project(x, w, cos, sin, shape, model.dtype))
        keys.append(torch.cat((context.keys[i], k)))
        values.append(torch.cat((context.values[i], v)))
        # Slots are positions here.
        known = None if pages is None or role is not Role.OWN else pages.of_layer(i, keys[i], slots[0].long())
        layer = LayerInput(q, keys[i], values[i], scaling, known)
        out = layers.run(plan, role, layer)
        if role in (Role.SPARSE, Role.OWN):
            shares.append(share_read(plan))
            if recall:
                recalls.append(_recall(plan, layer))
        x = finish(x, out.transpose(0, 1)[None], w, shape, model.dtype)
    attended = torch.stack(shares).mean(0) if shares else torch.ones(len(fed), device=fed.device)
    read = plan.seq_lens * (1 - (1 - attended) * len(shares) / shape.layers)
    found = Decoded(model.logits(x[0]), attended, read, torch.stack(recalls).mean(0) if recalls else None)
    return replace(context, keys=keys, values=values, last=x[0, -1:]), found


def _recall(plan: Plan, layer: LayerInput) -> Tensor:
    """Weight of the set in full attention, float32 [S], mean over query heads."""
    assert plan.chosen is not None
    context, chosen, counts = plan.context, plan.chosen.slots, plan.chosen.ends
    _, lse, logits = decode_with_scores(
        layer.q, layer.k_cache, layer.v_cache, context.slots, context.ends, layer.scaling
    )
    if chosen.dim() == 2:
        chosen, counts = chosen[:, None], counts[:, None]
    group = layer.q.shape[1] // chosen.shape[1]
    chosen, counts = chosen.repeat_interleave(group, dim=1), counts.repeat_interleave(group, dim=1)
    valid = torch.arange(chosen.shape[2], device=layer.q.device) < counts[..., None]
    # Slots are positions here. What lies behind `counts` may be anything.
    index = chosen.long().masked_fill(~valid, 0)
    weights = (logits.gather(2, index) - lse[..., None]).exp()
    return weights.masked_fill(~valid, 0).sum(2).mean(1)
