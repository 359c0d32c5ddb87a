"""How positions rotate a gate's queries and keys: as the base model's, over the gate's width."""

import torch

from lim_kernels.block_gates import Rotation
from sgl_lim.gates.config import GateConfig, GateError


def gate_rotation(config: GateConfig, head_dim: int, model: Rotation, theta: float | None) -> Rotation | None:
    """The rotation of a model's gates; None if they are not rotated.

    Args:
        head_dim: of the model's heads; model: their rotation.
        theta: base of the model's frequencies; None where these are scaled, so that it alone does not say them.

    Raises:
        GateError: nothing says by which frequencies such gates were rotated in training.
    """
    if not config.rotate:
        return None
    if head_dim == config.width and model.table.shape[1] == head_dim:
        return Rotation(model.table)
    if theta is None or model.table.shape[1] != head_dim:
        raise GateError(
            f"seerattn_gate_hidden_size {config.width}: the model's heads have {head_dim} elements, and its rotation "
            f"is scaled or partial, so that it says nothing of other widths; take gates of width {head_dim}"
        )
    return Rotation(plain_table(theta, config.width, len(model.table)).to(model.table.device))


def plain_table(theta: float, width: int, positions: int) -> torch.Tensor:
    """The table of an unscaled rotation, float32 [positions, width], as `Rotation` has it."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)
