"""What the verification of drafts does beside the dense backend's attention, and where it does that attention itself.

A pass verifies T tokens of each row: one that is known, at position C, and the drafts behind it. What it answers is
dense attention's, which the dense backend computes. `torch_native` has no verification, so on a CPU `attend_run` does
it. The T tokens of a row then read what they share once, and branches read a shared prefix once.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lim_kernels import find_prefix_groups
from lim_kernels.attention import attend_within
from sgl_lim.methods import Role
from sgl_lim.serving.draft_sets import Drafts
from sgl_lim.serving.layer import LayerDecode, LayerInput, attend_with_lse
from sgl_lim.serving.reads import Plan, Read, plan_reads


@dataclass(frozen=True)
class RunRead:
    """What the tokens attend to that are verified together."""

    context: Read
    """Of all T tokens of each row: what comes before them."""
    run: Tensor
    """int64 [B, T], KV slots of the tokens, each of which attends to itself and to those before it."""


@dataclass
class VerifyPlan:
    """What one verification reads beside the dense backend."""

    tokens: int
    """That are verified of each row."""
    attend: RunRead | None
    """Where our operators attend; None where the dense backend does."""
    guide: Plan | None
    """By which selection layers choose the sets of drafts, for the first token of each row; None: nothing to choose."""


def is_verification(forward_batch: Any) -> bool:
    """Whether this is a verification with rows in it."""
    return forward_batch.forward_mode.is_target_verify() and forward_batch.batch_size > 0


def tokens_verified(forward_batch: Any) -> int:
    """Tokens of each row that a verification takes: one that is known, and the drafts."""
    return int(forward_batch.spec_info.draft_token_num)


def plan_guide(decode: LayerDecode, slots: Tensor, lens: Tensor, granule: int | None) -> Plan | None:
    """By which selection layers score the context for one token of each row; None where no row outgrows the budget.

    Args:
        slots: int32 [B, L]; lens: int32 [B], the token that chooses included.
        granule: shared prefixes are found in multiples of so many tokens; None: they are not looked for.
    """
    plan = plan_reads(decode.method, slots, lens, together=decode.together, granule=granule)
    return plan if plan.select else None


def read_of_run(slots: Tensor, lens: Tensor, tokens: int, granule: int | None) -> RunRead:
    """What so many tokens behind each row attend to.

    Args:
        slots: int32 [B, L], those of these tokens included; lens: int32 [B], of the rows before them.
        granule: as in `plan_guide`.
    """
    groups = None
    if granule is not None and len(lens) > 1:
        groups = find_prefix_groups(slots, lens, granule=granule)
    places = lens.unsqueeze(1) + torch.arange(tokens, device=slots.device)
    return RunRead(Read(slots, lens, groups), slots.gather(1, places.long()).long())


def attend_run(read: RunRead, layer: LayerInput) -> Tensor:
    """Dense causal attention [B * T, H, D_v] of the tokens that are verified, whose keys and values are stored.

    The tokens of a row are as many query heads over what comes before all of them, which is read once.
    """
    batch, tokens = read.run.shape
    kv_heads = layer.k_cache.shape[1]
    # A CPU computes in float32 anyway, and rounds at the end then.
    queries = layer.q.float() if layer.q.device.type == "cpu" else layer.q
    # [B, H_kv * T * G, D]
    queries = queries.unflatten(0, (batch, tokens)).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(1, 3)
    before, before_lse = attend_with_lse(read.context, replace(layer, q=queries))
    within, within_lse = attend_within(queries, layer.k_cache, layer.v_cache, read.run, layer.scaling)
    lse = torch.logaddexp(before_lse, within_lse)
    out = before * (before_lse - lse).exp().unsqueeze(2) + within * (within_lse - lse).exp().unsqueeze(2)
    by_token = out.unflatten(1, (kv_heads, tokens, -1)).transpose(1, 2)
    return by_token.flatten(0, 1).flatten(1, 2).to(layer.q.dtype)


def guide_drafts(
    decode: LayerDecode, drafts: Drafts, plan: VerifyPlan, rows: Tensor, index: int, layer: LayerInput
) -> None:
    """Choose the sets of a selection layer for the drafts to come; the layer's keys are stored.

    Args:
        rows: integer [B], rows of the request pool.
        index: of the layer; layer: its query is [B * tokens, H, D].
    """
    assert plan.guide is not None and drafts.sets is not None
    first = LayerInput(layer.q[:: plan.tokens].contiguous(), layer.k_cache, layer.v_cache, layer.scaling)
    drafts.sets.keep(index, rows, *decode.choose_positions(plan.guide, first))


def guides(plan: VerifyPlan | None, role: Role) -> bool:
    """Whether a layer of this role chooses sets in a verification."""
    return plan is not None and plan.guide is not None and role is Role.SELECT
