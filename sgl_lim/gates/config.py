"""What `config.json` of a folder of gates says: the gates' own keys `seerattn_…`, and their base model's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lim_kernels.block_gates import POOLS

BLOCKS = (16, 32, 64)
WIDTHS = (64, 128, 256)
QUERIES = ("Qproj", "Qavgproj", "Qavg")
"""How the query heads of a KV head become one query: each projected and summed, their mean projected, their mean."""
DEFAULT_BLOCK = 64
"""Of the gates that the authors publish."""
_POOLING = "seerattn_k_seq_pooling_type"
_QUERY = "seerattn_q_head_pooling_type"
_FULL_POOLING = re.compile(rf"K((?:{'|'.join(POOLS)})+)")


class GateError(ValueError):
    """These gates cannot be used; the message says what was expected, what was found, and a way out."""


@dataclass(frozen=True)
class GateConfig:
    """The gates of a model, as their config names them."""

    block: int
    width: int
    pools: tuple[str, ...]
    query: str
    norm: bool
    rotate: bool
    start_layer: int
    """Layers before it are dense."""
    base_model: str | None
    model: Mapping[str, Any]
    """Facts of the base model that the file has, by their names in a Hugging Face config."""

    @staticmethod
    def of(values: Mapping[str, Any]) -> "GateConfig":
        """From the content of a `config.json`.

        Raises:
            GateError: these are gates for prefill, or ones that are not served.
        """
        for key in (_POOLING, _QUERY):
            if key not in values:
                raise GateError(
                    f"its config.json has no {key}: these are no gates for decode, such as "
                    "SeerAttention/SeerAttention-Decode-Qwen3-8B-AttnGates; gates for prefill are not served"
                )
        if values.get("seerattn_decode") is False:
            raise GateError("its config.json says seerattn_decode false: gates for prefill are not served")
        config = GateConfig(
            block=_whole(values, "seerattn_gate_block_size", DEFAULT_BLOCK),
            width=_whole(values, "seerattn_gate_hidden_size", 128),
            pools=pools_of(str(values[_POOLING])),
            query=str(values[_QUERY]),
            norm=bool(values.get("seerattn_use_qk_norm", False)),
            rotate=bool(values.get("seerattn_use_rope", True)),
            start_layer=_whole(values, "seerattn_start_layer", 0),
            base_model=values.get("base_model"),
            model={key: value for key, value in values.items() if not key.startswith(("seerattn_", "base_model", "_"))},
        )
        _check(config)
        return config

    def values(self) -> dict[str, Any]:
        """As the authors' `config.json` has them."""
        return {
            **self.model,
            "base_model": self.base_model,
            "seerattn_decode": True,
            "seerattn_prefill": False,
            "seerattn_gate_block_size": self.block,
            "seerattn_gate_hidden_size": self.width,
            _POOLING: f"K{''.join(self.pools)}",
            _QUERY: self.query,
            "seerattn_use_qk_norm": self.norm,
            "seerattn_use_rope": self.rotate,
            "seerattn_start_layer": self.start_layer,
        }


def pools_of(name: str) -> tuple[str, ...]:
    """The pools of a class name such as `Kmaxminavg`, in their order. Raises GateError."""
    found = _FULL_POOLING.fullmatch(name)
    pools = tuple(re.findall("|".join(POOLS), found[1])) if found else ()
    if not pools or len(set(pools)) != len(pools):
        raise GateError(f"{_POOLING} {name!r}: expected K and some of {', '.join(POOLS)}, such as Kmaxminavg")
    return pools


def _check(config: GateConfig) -> None:
    if config.block not in BLOCKS:
        raise GateError(f"seerattn_gate_block_size {config.block}: expected one of {', '.join(map(str, BLOCKS))}")
    if config.width not in WIDTHS:
        raise GateError(f"seerattn_gate_hidden_size {config.width}: expected one of {', '.join(map(str, WIDTHS))}")
    if config.query not in QUERIES:
        raise GateError(f"{_QUERY} {config.query!r}: expected one of {', '.join(QUERIES)}")


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GateError(f"{key} must be a whole number, got {value!r}")
    return value
