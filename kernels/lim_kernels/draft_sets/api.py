"""Public entry of draft sets: validation and dispatch."""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_one_device, require_rows
from lim_kernels.draft_sets import reference
from lim_kernels.draft_sets.state import DraftMemory, DraftSizes


def place_drafts(
    memory: DraftMemory,
    rows: Tensor,
    tenants: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    sizes: DraftSizes,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The KV slots that a draft step attends to, by selection layer, row and set.

    A row no longer than the budget attends to all it has. A longer row attends to its set and to all tokens since that
    was chosen, if its tenant has one and these tokens find room; else to sinks and the last tokens, `budget` in all.
    A set names positions before the token that chose it alone, so nothing that was drafted and rejected is in one.

    Args:
        memory: read.
        rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph.
        tenants: int64 [R], who has each row.
        slots: int32 [B, L], KV slot of each position; entries at or beyond `seq_lens[b]` may hold anything.
        seq_lens: int32 or int64 [B], each 1 … L, the token drafted from included.

    Returns:
        slots int32 [S, B, H, budget + room], 0 behind the ends; ends int32 [S, B, H], how many count.

    Raises:
        ValueError: wrong shape, dtype or layout, or an unknown implementation.
    """
    op = "place_drafts"
    layers, num_rows, heads, budget = memory.sets.shape
    require(budget == sizes.budget > sizes.sinks >= 0, op, f"sets of {sizes.budget} tokens beyond the sinks", budget)
    require(sizes.room >= 1, op, "room for a token behind a set", sizes.room)
    shapes = {"counts": (layers, num_rows, heads), "lengths": (num_rows,), "tenants": (num_rows,)}
    for name, shape in shapes.items():
        require(getattr(memory, name).shape == shape, op, f"{name} {list(shape)}", list(getattr(memory, name).shape))
    for name, tensor in vars(memory).items():
        expected = torch.int64 if name == "tenants" else torch.int32
        require(tensor.dtype == expected and tensor.is_contiguous(), op, f"contiguous {name} {expected}", tensor.dtype)
    fits = tenants.shape == (num_rows,) and tenants.dtype == torch.int64
    require(fits, op, f"tenants int64 [{num_rows}]", f"{tenants.dtype} {list(tenants.shape)}")
    require(slots.dim() == 2 and slots.dtype == torch.int32, op, "slots int32 [B, L]", f"{slots.dtype} {slots.shape}")
    for name, tensor in (("rows", rows), ("seq_lens", seq_lens)):
        require(tensor.shape == slots.shape[:1], op, f"{name} [{slots.shape[0]}]", list(tensor.shape))
    require_rows(op, rows, seq_lens, slots, tenants)
    require_one_device(op, memory.sets, rows, tenants, slots, seq_lens)
    return implementation_of(reference.place_drafts, implementation, slots)(
        memory, rows, tenants, slots, seq_lens, sizes
    )
