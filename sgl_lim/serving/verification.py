"""What the verification of drafts does beside the dense backend's attention, and where it does that attention itself.

A pass verifies T tokens of each row: one that is known, at position C, and the drafts behind it. What it answers is
dense attention's, which the dense backend computes. `torch_native` has no verification, so on a CPU `grouped_decode`
does it, with a row for each token. Rows that share leading slots are read once there: the T rows of one request, and
branches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lim_kernels import find_prefix_groups
from sgl_lim.methods import Role
from sgl_lim.serving.draft_sets import Drafts
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Plan, Read, plan_reads

_GRANULE = 32
"""On a CPU the rows of one request share all but their last tokens, and reading those together costs nothing."""


@dataclass
class VerifyPlan:
    """What one verification reads beside the dense backend."""

    tokens: int
    """That are verified of each row."""
    attend: Read | None
    """Of B * tokens rows, where our operators attend; None where the dense backend does."""
    guide: Plan | None
    """By which selection layers choose the sets of drafts, for the first token of each row; None: nothing to choose."""


def is_verification(forward_batch: Any) -> bool:
    """Whether this is a verification with rows in it."""
    return forward_batch.forward_mode.is_target_verify() and forward_batch.batch_size > 0


def plan_verification(
    decode: LayerDecode, drafts: Drafts, slots: Tensor, lens: Tensor, *, granule: int | None, attends: bool
) -> VerifyPlan:
    """The plan of a verification; in a captured graph this is recorded and replayed.

    Args:
        slots: int32 [B, L], KV slot of each position, those of the tokens to verify included.
        lens: int32 [B], of the rows before these tokens.
        granule: shared prefixes are found in multiples of so many tokens; None: they are not looked for.
        attends: whether attention is ours.
    """
    guide = None
    if drafts.sets is not None:
        first = lens + 1
        plan = plan_reads(decode.method, slots, first, own_heads=decode.heads.own, granule=granule)
        guide = plan if plan.select else None
    return VerifyPlan(drafts.tokens, read_of_tokens(slots, lens, drafts.tokens) if attends else None, guide)


def read_of_tokens(slots: Tensor, lens: Tensor, tokens: int) -> Read:
    """Rows of their own for the tokens behind each row, int32 [B * tokens, L], which see those before them."""
    each = torch.arange(1, tokens + 1, dtype=torch.int32, device=slots.device)
    ends = (lens.unsqueeze(1) + each).flatten()
    by_token = slots.repeat_interleave(tokens, dim=0)
    return Read(by_token, ends, find_prefix_groups(by_token, ends, granule=_GRANULE))


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
