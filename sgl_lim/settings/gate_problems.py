"""Why gates cannot serve a model, told before its weights load. Every reason names the flag and a way out."""

import logging
from pathlib import Path
from typing import Any

from sgl_lim.gates import GateConfig, GateError
from sgl_lim.gates.weights import ModelShape, read_shapes, shape_problems
from sgl_lim.methods import Method, SeerAttention

logger = logging.getLogger(__name__)

_FACTS = ("model_type", "hidden_size", "intermediate_size", "vocab_size")
"""What tells models of one shape of heads apart, beside their names."""


def gate_problems(method: Method, model: Any, tp_size: int) -> list[str]:
    """Reasons in the gates of a method; none where it has no gates, or where `conflicts` told why they cannot be read.

    Args:
        model: SGLang's model config.
    """
    if not isinstance(method, SeerAttention) or method.gate_config is None:
        return []
    assert method.gates is not None
    config, flag = method.gate_config, f"--lim-gates {method.gates}"
    found = [f"{flag}: {reason}" for reason in _model_problems(config, method.gates, model)]
    kv_heads = model.get_total_num_kv_heads()
    if tp_size > kv_heads:
        found.append(
            f"--tp-size {tp_size}: a gate's query is made of all query heads of a KV head, and {kv_heads} KV heads "
            f"would be shared by several ranks each; use --tp-size {kv_heads} or less"
        )
    if getattr(model, "is_multimodal", False):
        found.append(f"{flag}: a multimodal model rotates keys by more than one position; take --lim-method quest")
    return found


def _model_problems(config: GateConfig, path: str, model: Any) -> list[str]:
    """Why gates are not those of a model."""
    shape = ModelShape(
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.head_dim,
    )
    text, found = model.hf_text_config, []
    for name in _FACTS:
        trained, served = config.model.get(name), getattr(text, name, None)
        if trained is not None and served is not None and trained != served:
            found.append(f"they were trained for {name} {trained}, and the model has {served}; take this model's gates")
    found += _name_problems(config.base_model, model.model_path)
    try:
        found += shape_problems(config, read_shapes(path), shape)
    except GateError as error:
        found.append(str(error))
    return found


def _name_problems(trained_for: str | None, model_path: str) -> list[str]:
    """Whether the names say that gates are of another model. A folder may have any name, and only makes us say so."""
    if not trained_for:
        return []
    own, base = _name(model_path), _name(trained_for)
    if own == base:
        return []
    if Path(model_path).expanduser().exists() and not _is_snapshot(model_path):
        logger.warning(
            "sgl-lim: the gates were trained for %s, and the model is served from %s: make sure that it is the same",
            trained_for,
            model_path,
        )
        return []
    return [f"they were trained for {trained_for}, and the model is {model_path}; take this model's gates"]


def _name(model: str) -> str:
    """The last part of a path or of a name on the hub; of a folder of the hub's cache the model's."""
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    named = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (named or parts or [""])[-1].lower()


def _is_snapshot(model: str) -> bool:
    return "models--" in model and "snapshots" in model
