"""Built-in presets: selection layers by a model's name. They attend to the whole context."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Selection layers measured for one checkpoint family."""

    name: str
    num_layers: int
    selection_layers: tuple[int, ...]
    source: str


PRESETS = (
    Preset("qwen3-8b", 36, (2, 12), "LessIsMore, arXiv 2508.07101"),
    Preset("qwen3-4b", 36, (2, 20), "LessIsMore, arXiv 2508.07101"),
    Preset("deepseek-r1-distill-llama-8b", 32, (2, 13), "LessIsMore, arXiv 2508.07101"),
    Preset("chain-tracer", 12, (2, 8), "measured: models/chain-tracer/README.md"),
    Preset("source-reader", 12, (1, 5, 8), "measured: docs/accuracy.md"),
)


def find_preset(model_path: str, num_layers: int) -> Preset | None:
    """The preset whose name occurs in the model's path (any case, `_` as `-`) and whose depth is the model's.

    The last part of the path that names a preset decides: folders above a checkpoint may name other models, and the
    hub's snapshot folders below it name none.
    """
    for part in reversed(model_path.lower().replace("_", "-").split("/")):
        for preset in PRESETS:
            if preset.name in part and preset.num_layers == num_layers:
                return preset
    return None
