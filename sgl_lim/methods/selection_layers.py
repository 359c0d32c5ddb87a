"""What methods share whose layers are told apart by selection layers, and that keep sinks."""

from typing import Any

from sgl_lim.methods.parameters import Increasing, Whole, parameter

UNRESOLVED: tuple[int, ...] = ()
"""Selection layers before a model is known."""


def selection_layers_parameter() -> Any:
    """Field `selection_layers`."""
    return parameter(
        UNRESOLVED,
        Increasing(),
        "Layers that attend fully and choose the set; earlier ones stay dense (default: the model's preset)",
    )


def sinks_parameter() -> Any:
    """Field `sinks`."""
    return parameter(4, Whole(least=0, metavar="S"), "Leading tokens that are always kept")
