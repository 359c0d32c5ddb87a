"""Choice of an implementation by name, shared by every operator's `api.py`."""


def resolve(op: str, implementation: str | None, available: tuple[str, ...], default: str) -> str:
    """Name of the implementation to run.

    Args:
        op: operator name, for the message.
        implementation: a name, or None for `default`.
        available: the operator's implementations.
        default: what the operands' device and shapes suggest.

    Raises:
        ValueError: the name is unknown for this operator.
    """
    if implementation is None:
        return default
    require(implementation in available, op, f"implementation among {', '.join(available)}", repr(implementation))
    return implementation


def require(condition: bool, op: str, expected: str, actual: object) -> None:
    """Raise ValueError("op: expected …, got …") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {actual}")
