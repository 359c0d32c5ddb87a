"""A selection method from a configuration."""

from typing import Any

from sgl_lim.methods import METHODS, Method
from sgl_lim.settings import adaptive
from sgl_lim.settings.config import LimConfig


def ranking(config: LimConfig) -> dict[str, Any]:
    """Parameters of a method that do not depend on the model or the budget."""
    return {
        **adaptive.parameters(config),
        "sinks": config.sinks,
        "aggregate": config.aggregate,
        "scope": config.scope or METHODS[config.method].scopes[0],
    }


def build_method(config: LimConfig, selection_layers: tuple[int, ...]) -> Method:
    """The configured method, selecting at layers that were resolved against a model."""
    return METHODS[config.method](
        budget=config.budget,
        selection_layers=selection_layers,
        prefix_selection=config.prefix_selection,
        **ranking(config),
    )
