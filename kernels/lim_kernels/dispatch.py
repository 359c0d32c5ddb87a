"""Choice of an implementation by name or by device, shared by every operator's `api.py`."""

import torch


def resolve(op: str, implementation: str | None, available: tuple[str, ...], device: torch.device) -> str:
    """Name of the implementation to run.

    Args:
        op: operator name, for the message.
        implementation: a name, or None to let the device decide.
        available: the operator's implementations, the preferred one for each device type first.
        device: device of the operands.

    Raises:
        ValueError: the name is unknown for this operator.
    """
    if implementation is None:
        return "triton" if device.type == "cuda" and "triton" in available else "reference"
    if implementation not in available:
        raise ValueError(f"{op}: implementation must be one of {', '.join(available)}, got {implementation!r}")
    return implementation


def require(condition: bool, op: str, expected: str, actual: object) -> None:
    """Raise ValueError("op: expected …, got …") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {actual}")
