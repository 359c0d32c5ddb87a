"""Attention of Hugging Face models by the code of a served step: tokens that are known run as rows of one step.

Where all tokens are given, the steps need not run one after another: at each layer the keys and values of all tokens
are stored, and row t attends to positions 0 … t by `sgl_lim.serving.layer`. A row sees what the rows before it left,
which sparse layers have shaped, as in a server.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels import Scaling, bound_pages
from lim_kernels.page_bounds import PAGE, PageBounds
from sgl_lim.methods import HeadsOfRank, Method, Role
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Plan, plan_reads

INTERFACE = "sgl_lim_rows"
"""The name of this attention in transformers."""
GRANULE = 64
"""The rows share their prompt, which is read once for all, as a server does: in multiples of so many tokens."""
_BEYOND = {"sliding_window": "a sliding window", "softcap": "capped logits", "s_aux": "attention sinks"}


class UnsupportedModel(ValueError):
    """The checkpoint's attention is not what a served step computes; the message names what differs."""


class Pass(Protocol):
    """What the layers of one forward pass do."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention [1, S, H, D_v] of q [1, H, S, D] over k [1, H_kv, L, D] and v [1, H_kv, L, D_v]."""
        ...


_under_way: ContextVar[Pass | None] = ContextVar(INTERFACE, default=None)


@contextmanager
def under_way(one: Pass) -> Iterator[None]:
    """Attention of models that use `INTERFACE` is this pass's meanwhile."""
    token = _under_way.set(one)
    try:
        yield
    finally:
        _under_way.reset(token)


def attention_interface(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Raises:
        UnsupportedModel: the layer asks for more than scaled attention over all that came before.
        RuntimeError: no pass is under way.
    """
    for name, what in _BEYOND.items():
        if given.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} asks for {what}, which is not measured here")
    one = _under_way.get()
    if one is None:
        raise RuntimeError(f"attention {INTERFACE} runs within a pass of sgl_lim.evaluate only")
    layer, scale = getattr(module, "layer_idx", None), given.get("scaling")
    if layer is None or scale is None:
        raise UnsupportedModel(f"{type(module).__name__} does not say which layer it is, or how it scales")
    return one.attend(layer, query, key, value, scale), None


@dataclass
class PromptPass:
    """Dense causal attention from an empty cache, as a server's prefill."""

    seen: set[int] = field(default_factory=set)
    """Layers that attended."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Pass`."""
        if q.shape[2] != k.shape[2]:
            raise RuntimeError(f"a prompt of {q.shape[2]} tokens runs on an empty cache, not one of {k.shape[2]}")
        self.seen.add(layer)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()


class StepRows:
    """Decode steps of tokens that are known, as rows of one step."""

    def __init__(self, method: Method, *, before: int, rows: int, heads: int, depth: int, device: torch.device) -> None:
        """The plan of a step.

        Args:
            before: tokens in the cache; rows: tokens fed; heads: query heads; depth: layers.
        """
        self._roles = method.layer_roles(depth)
        self._slots = torch.arange(before + rows, device=device, dtype=torch.int32).repeat(rows, 1)
        lens = torch.arange(before + 1, before + rows + 1, device=device, dtype=torch.int32)
        self._plan = plan_reads(method, self._slots, lens, own_heads=heads, granule=GRANULE)
        self._decode = LayerDecode(method, HeadsOfRank(0, heads, heads))
        self._shares: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Pass`; the cache has the rows' own keys and values."""
        keys, values = (t[0].transpose(0, 1).contiguous() for t in (k, v))
        if len(keys) != self._slots.shape[1]:
            raise RuntimeError(f"layer {layer} has {len(keys)} tokens in its cache, expected {self._slots.shape[1]}")
        role = self._roles[layer]
        bounds = page_bounds_of(keys, self._slots[0]) if role is Role.OWN else None
        rows = LayerInput(q[0].transpose(0, 1).contiguous(), keys, values, Scaling(scale), bounds)
        out = self._decode.run(self._plan, role, rows)
        if role in (Role.SPARSE, Role.OWN):
            self._shares.append(share_read(self._plan))
        return out[None]

    def attended(self) -> Tensor:
        """Share of their context that sparse layers read, float32 [S], mean over them; 1 if there are none."""
        if not self._shares:
            return torch.ones(len(self._slots), device=self._slots.device)
        return torch.stack(self._shares).mean(0)

    def read(self) -> Tensor:
        """Tokens that a layer reads, float32 [S], mean over all layers."""
        missed = (1 - self.attended()) * len(self._shares) / len(self._roles)
        return self._plan.seq_lens * (1 - missed)


def page_bounds_of(keys: Tensor, slots: Tensor) -> PageBounds:
    """Bounds of all pages. A row's last one may hold later rows' tokens, but no row ranks its last page."""
    sides = (keys.new_empty(-(-len(keys) // PAGE), *keys.shape[1:]) for _ in range(2))
    bounds = PageBounds(*sides)
    bound_pages(bounds, keys, slots)
    return bounds


def share_read(plan: Plan) -> Tensor:
    """Share of their context that a layer's rows read, float32 [S]."""
    assert plan.chosen is not None
    counts = plan.chosen.ends.float()
    return (counts if counts.dim() == 1 else counts.mean(1)) / plan.seq_lens
