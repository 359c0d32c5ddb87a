"""Public entry of the memory of sets: validation and dispatch.

A step calls `decide_actions` once, `place_sets` once and `keep_sets` at each remembered selection layer. None of them
waits for the device, and rows that have nothing to do in one cost nothing there.
"""

import torch
from torch import Tensor

from lim_kernels.dispatch import implementation_of, require, require_rows
from lim_kernels.operands import SetSizes
from lim_kernels.set_memory import reference
from lim_kernels.set_memory.state import Decision, SetMemory


def decide_actions(
    memory: SetMemory,
    rows: Tensor,
    tenants: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    interval: int,
    early: bool,
    implementation: str | None = None,
) -> Decision:
    """Begin a step: decide what each row does, recall sets, and bring the memory's account of the rows up to date.

    A row has a set if its tenant stored one in an earlier step; its positions keep their tokens. It uses the set until
    that is `interval` tokens old. A row whose tenant has not decoded before recalls a set, as if it had just been
    chosen: the candidates that were selected last, equal ones by position, if in every layer enough are known. The slot
    of each row's last position, which the step has just written, forgets what it knew.

    Args:
        memory: written.
        rows: int32 or int64 [B], rows of the request pool; row 0 only pads a captured graph and has no memory.
        tenants: int64 [R], who has each row.
        slots: int32 [B, L], KV slot of each position.
        seq_lens: int32 or int64 [B], the current token included.
        sizes: as in `score_tokens`.
        interval: 1 or more; with 1 every row chooses at every step.
        early: whether rows attend to the set that they have in the layers before the first selection layer.

    Raises:
        ValueError: wrong shape, dtype or layout, or an unknown implementation.
    """
    op = "decide_actions"
    _check(op, memory, rows, seq_lens, slots, sizes.middle)
    fits = tenants.shape == memory.tenants.shape and tenants.dtype == torch.int64
    require(fits, op, f"tenants int64 {list(memory.tenants.shape)}", f"{tenants.dtype} {list(tenants.shape)}")
    require(interval >= 1, op, "an interval of at least 1", interval)
    require_rows(op, tenants)
    decide = implementation_of(reference.decide_actions, implementation, slots)
    return decide(memory, rows, tenants, slots, seq_lens, sizes, interval=interval, early=early)


def place_sets(
    memory: SetMemory,
    layer: int,
    rows: Tensor,
    actions: Tensor,
    extended: Tensor,
    seq_lens: Tensor,
    sizes: SetSizes,
    *,
    implementation: str | None = None,
) -> None:
    """Write the sets of rows that attend to one, their window moved along, before their slots.

    Args:
        memory, rows, seq_lens, sizes: as in `decide_actions`.
        layer: which of the S layers' sets.
        actions: uint8 [B], as decided.
        extended: int32 [B, K + L], room for a set, then the KV slot of each position; the room of rows that attend to a
            set is written.

    Raises:
        ValueError: as `decide_actions`.
    """
    op = "place_sets"
    _check(op, memory, rows, seq_lens, extended, sizes.middle)
    _check_layer(op, memory, layer, actions, rows)
    place = implementation_of(reference.place_sets, implementation, extended)
    place(memory, layer, rows, actions, extended, seq_lens, sizes)


def keep_sets(
    memory: SetMemory,
    layer: int,
    rows: Tensor,
    actions: Tensor,
    extended: Tensor,
    seq_lens: Tensor,
    chosen: Tensor,
    sizes: SetSizes,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """End a selection layer: remember what was chosen, and tell the sets in force.

    The sets of the next remembered layer, if there is one, are placed for rows that do not choose.

    Args:
        memory, layer, rows, actions, extended, seq_lens, sizes: as in `place_sets`; `extended` holds this
            layer's sets.
        chosen: int32 [B, K], positions that rows with SELECT chose, as `choose_tokens`; undefined for others.

    Returns:
        The sets in force, int32 [B, K] in KV slots, 0 after their counts, and counts int32 [B].

    Raises:
        ValueError: as `decide_actions`.
    """
    op = "keep_sets"
    _check(op, memory, rows, seq_lens, extended, sizes.middle)
    _check_layer(op, memory, layer, actions, rows)
    fits = chosen.shape == (len(rows), sizes.budget) and chosen.dtype == torch.int32
    require(fits, op, f"chosen int32 [{len(rows)}, {sizes.budget}]", f"{chosen.dtype} {list(chosen.shape)}")
    require_rows(op, chosen)
    keep = implementation_of(reference.keep_sets, implementation, extended)
    return keep(memory, layer, rows, actions, extended, seq_lens, chosen, sizes)


def _check(op: str, memory: SetMemory, rows: Tensor, seq_lens: Tensor, slots: Tensor, middle: int) -> None:
    layers, num_rows, ranked = memory.sets.shape
    require(ranked == middle >= 0, op, f"sets of {middle} ranked tokens", ranked)
    require(memory.stamps.dim() == 2 and len(memory.stamps) == layers, op, f"stamps [{layers}, N]", memory.stamps.shape)
    for name in ("tenants", "lengths", "ages"):
        shape = getattr(memory, name).shape
        require(shape == (num_rows,), op, f"{name} [{num_rows}]", list(shape))
    for name, tensor in vars(memory).items():
        expected = torch.int64 if name == "tenants" else torch.int32
        fits = tensor.dtype == expected and tensor.is_contiguous()
        require(fits, op, f"contiguous {name} {expected}", tensor.dtype)
    require(slots.dim() == 2 and slots.dtype == torch.int32, op, "slots int32 [B, L]", f"{slots.dtype} {slots.shape}")
    for name, tensor in (("rows", rows), ("seq_lens", seq_lens)):
        require(tensor.shape == slots.shape[:1], op, f"{name} [{slots.shape[0]}]", list(tensor.shape))
    require_rows(op, rows, seq_lens, slots)


def _check_layer(op: str, memory: SetMemory, layer: int, actions: Tensor, rows: Tensor) -> None:
    require(0 <= layer < len(memory.sets), op, f"a layer below {len(memory.sets)}", layer)
    fits = actions.shape == rows.shape and actions.dtype == torch.uint8 and actions.is_contiguous()
    require(fits, op, f"contiguous actions uint8 {list(rows.shape)}", f"{actions.dtype} {list(actions.shape)}")
