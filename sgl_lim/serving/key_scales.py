"""What stored keys are multiplied by, layer by layer: fp8 pools keep them divided by a scale of the checkpoint's.

SGLang keeps the scale in each layer's `RadixAttention`. It is read from there whenever keys are. A captured graph has
the scale of its capture, like the dense backends' graphs: new weights with other KV scales need a new start.
"""

from collections.abc import Iterable
from typing import Any


class UnknownScale(ValueError):
    """A layer's scale cannot be told; the message says which and why."""


def key_scale(attention: Any) -> float:
    """What a layer's stored keys are multiplied by; 1 for layers that store them as they are.

    Args:
        attention: SGLang's `RadixAttention`.

    Raises:
        UnknownScale: SGLang stores keys by a scale that no attention backend is told.
    """
    if attention.k_scale is None:
        return 1.0
    if attention.k_scale_float is None:
        raise UnknownScale(
            f"layer {attention.layer_id} stores its keys by a scale, and has no k_scale_float to read them by; take a "
            "checkpoint that holds its KV scales, in place of --quantization-param-path, or --kv-cache-dtype auto"
        )
    return float(attention.k_scale_float)


def attention_layers(model: Any, layers: Iterable[int]) -> dict[int, Any]:
    """SGLang's `RadixAttention` of each of some layers.

    Raises:
        UnknownScale: a layer has none or several, or the scale of its keys is not known.
    """
    found: dict[int, list[Any]] = {layer: [] for layer in layers}
    for module in model.modules():
        if hasattr(module, "k_scale") and getattr(module, "layer_id", None) in found:
            found[module.layer_id].append(module)
    for layer, modules in found.items():
        if len(modules) != 1:
            raise UnknownScale(
                f"layer {layer} of {type(model).__name__} should have one attention that stores keys, and has "
                f"{len(modules)}; take --lim-method quest"
            )
        key_scale(modules[0])
    return {layer: modules[0] for layer, modules in found.items()}
