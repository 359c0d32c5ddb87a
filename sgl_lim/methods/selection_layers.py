"""What methods share whose layers are told apart by selection layers, and that keep sinks."""

from typing import Any

from sgl_lim.methods.parameters import Increasing, Whole, parameter

UNRESOLVED: tuple[int, ...] = ()
"""Selection layers before a model is known."""
DEFAULT_LAYERS = "default"
"""Asks for the layers that a checkpoint gets which was never calibrated."""


def selection_layers_parameter() -> Any:
    """Field `selection_layers`."""
    return parameter(
        UNRESOLVED,
        Increasing(word=DEFAULT_LAYERS),
        "Layers that choose the set; earlier ones stay dense. By default the calibrated ones, if the checkpoint was "
        f"calibrated, else those of its built-in preset, else spaced ones; {DEFAULT_LAYERS} leaves the first out",
    )


def sinks_parameter() -> Any:
    """Field `sinks`."""
    return parameter(4, Whole(least=0, metavar="S"), "Leading tokens that are always kept")
