"""Attention of Hugging Face models by the code of a served step: tokens that are known run as rows of one step.

Where all tokens are given, the steps need not run one after another: at each layer the keys and values of all tokens
are stored, and row t attends to positions 0 … t by `sgl_lim.serving.layer`. A row sees what the rows before it left,
which sparse layers have shaped, as in a server. Rows of several sequences can run together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lim_kernels import Scaling
from sgl_lim.evaluate.own_pages import OwnPages, positions_of
from sgl_lim.evaluate.pool import Pool
from sgl_lim.methods import HeadsOfRank, Method, Role
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Plan, places_together, plan_reads

INTERFACE = "sgl_lim_rows"
"""The name of this attention in transformers."""
GRANULE = 64
"""The rows share their prompt, which is read once for all, as a server does: in multiples of so many tokens."""
_BEYOND = {"softcap": "capped logits", "s_aux": "attention sinks"}


class UnsupportedModel(ValueError):
    """The checkpoint's attention is not what a served step computes; the message names what differs."""


class Pass(Protocol):
    """What the layers of one forward pass do."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention [1, S, H, D_v] of q [1, H, S, D], with k [1, H_kv, S, D] and v [1, H_kv, S, D_v] of them."""
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
    window, config = given.get("sliding_window"), cast(Any, module).config
    # A window that no context outgrows drops nothing.
    if window is not None and window < config.get_text_config().max_position_embeddings:
        raise UnsupportedModel(f"{type(module).__name__} asks for a sliding window, which is not measured here")
    one = _under_way.get()
    if one is None:
        raise RuntimeError(f"attention {INTERFACE} runs within a pass of sgl_lim.evaluate only")
    layer, scale = getattr(module, "layer_idx", None), given.get("scaling")
    if layer is None or scale is None:
        raise UnsupportedModel(f"{type(module).__name__} does not say which layer it is, or how it scales")
    return one.attend(layer, query, key, value, scale), None


@dataclass
class PromptPass:
    """Dense causal attention of a sequence's last tokens, as a server's prefill behind what its cache has."""

    pool: Pool
    slots: Tensor
    """int64 [L]: of the whole sequence."""
    seen: set[int] = field(default_factory=set)
    """Layers that attended."""
    note: Callable[[int, Tensor, float], None] | None = None
    """Is told each layer's queries [1, H, S, D] and their scale."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Pass`."""
        self.seen.add(layer)
        if self.note is not None:
            self.note(layer, q, scale)
        rows, length, mask = q.shape[2], len(self.slots), None
        self.pool.store(layer, self.slots[length - rows :], k, v)
        if rows < length:
            k, v = (kept[self.slots].transpose(0, 1)[None] for kept in self.pool.of_layer(layer))
            mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Rows:
    """Known tokens, one a row, of one sequence or several."""

    ids: Tensor  # int64 [R]
    slots: Tensor  # int32 [R, W]: slot of each position, the row's own token's too
    lens: Tensor  # int32 [R]: positions that a row attends to, its own included

    @property
    def own(self) -> Tensor:
        """int64 [R]: the slots of the rows' own tokens."""
        return self.slots.gather(1, (self.lens - 1).long().unsqueeze(1)).squeeze(1).long()


class StepRows:
    """Decode steps of tokens that are known, as rows of one step."""

    def __init__(
        self, method: Method, pool: Pool, rows: Rows, *, heads: int, depth: int, pages: OwnPages | None = None
    ) -> None:
        """The plan of a step.

        Args:
            heads: query heads; depth: layers.
            pages: what layers choose by, where they choose for themselves.
        """
        self._pages = pages
        self._of_slots: Tensor | None = None
        self._roles, self._pool, self._own = method.layer_roles(depth), pool, rows.own
        self._plan = plan_reads(method, rows.slots, rows.lens, together=places_together(heads), granule=GRANULE)
        self._decode = LayerDecode(method, HeadsOfRank(0, heads, heads))
        self._keys_alone = method.selection_attends == "set"
        self._shares: dict[Role, list[Tensor]] = {role: [] for role in Role}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Pass`; k and v are the rows' own."""
        self._pool.store(layer, self._own, k, v)
        keys, values = self._pool.of_layer(layer)
        role = self._roles[layer]
        known = None
        if role is Role.OWN:
            assert self._pages is not None
            known = self._pages.of_layer(layer, keys, self._positions(len(keys)))
        rows = LayerInput(q[0].transpose(0, 1).contiguous(), keys, values, Scaling(scale), known)
        out = self._decode.run(self._plan, role, rows)
        if role is not Role.DENSE:
            self._shares[role].append(share_read(self._plan))
        return out[None]

    def _positions(self, count: int) -> Tensor:
        """int64 [count]: of the tokens in the pool's slots; the same in every layer."""
        if self._of_slots is None:
            self._of_slots = positions_of(self._plan.context.slots, self._plan.seq_lens, count)
        return self._of_slots

    def attended(self) -> Tensor:
        """Share of their context that sparse layers read, float32 [R], mean over them; 1 if there are none."""
        shares = self._shares[Role.SPARSE] + self._shares[Role.OWN]
        return torch.stack(shares).mean(0) if shares else torch.ones_like(self._plan.seq_lens, dtype=torch.float32)

    def read(self) -> Tensor:
        """Tokens that a layer reads, float32 [R], mean over all layers.

        A selection layer that attends to its set reads the keys of all tokens, which are half of what it has of each,
        and the set.
        """
        shares = self._shares[Role.SPARSE] + self._shares[Role.OWN]
        if self._keys_alone:
            # Where nothing is sparse, the set is the context and is read once.
            shares += [share.where(share == 1, 0.5 + share) for share in self._shares[Role.SELECT]]
        missed = sum((1 - share for share in shares), torch.zeros_like(self._plan.seq_lens, dtype=torch.float32))
        return self._plan.seq_lens * (1 - missed / len(self._roles))


def share_read(plan: Plan) -> Tensor:
    """Share of their context that a layer's rows read, float32 [S]."""
    assert plan.chosen is not None
    counts = plan.chosen.ends.float()
    return (counts if counts.dim() == 1 else counts.mean(1)) / plan.seq_lens
