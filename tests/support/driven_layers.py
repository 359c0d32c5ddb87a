"""Layers of a method driven without a server or a backend."""

import torch
from torch import Tensor

from lim_kernels import Scaling
from sgl_lim.methods import HeadsOfRank, Method
from sgl_lim.methods.parameters import parameters_of
from sgl_lim.serving import reads
from sgl_lim.serving.layer import LayerDecode, LayerInput
from sgl_lim.serving.reads import Plan, plan_reads
from sgl_lim.settings.config import configure


def build_method(name: str, **values) -> Method:
    """A method from a configuration's values; those that it does not have are left out, as a server does."""
    return configure(method=name, **values).build()


def scopes_of(kind: type[Method]) -> tuple[str, ...]:
    """The scopes that a method has, its default first."""
    declared = parameters_of(kind).get("scope")
    return ("global",) if declared is None else declared.form.choices


def attends_of(kind: type[Method]) -> tuple[str, ...]:
    """What a method's selection layers may attend to, the default first."""
    declared = parameters_of(kind).get("selection_attends")
    return ("context",) if declared is None else declared.form.choices


def sizes_of(kind: type[Method]) -> tuple[float, int]:
    """Recency and sinks of a method's sets if it is given 0.25 and 4: none where it has no sinks to keep."""
    return (0.25, 4) if "sinks" in parameters_of(kind) else (0.0, 0)


def decode_of(method: Method, heads: int, combine_ranks=None) -> LayerDecode:
    """For a rank that has all heads."""
    return LayerDecode(method, HeadsOfRank(first=0, own=heads, all=heads), combine_ranks)


def plan_of(decode: LayerDecode, slots: Tensor, lens: Tensor, granule: int | None = None) -> Plan:
    """The plan of a step without sets from earlier ones."""
    return plan_reads(decode.method, slots, lens, together=decode.together, granule=granule)


def layer_of(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds=None) -> LayerInput:
    """A layer without cap or quantisation."""
    return LayerInput(q, k, v, Scaling(scale), bounds)


def score_rows_at_once(monkeypatch, rows: int, *, heads: int, width: int) -> None:
    """Let selection layers of so many heads and places score so many rows together."""
    monkeypatch.setattr(reads, "SCORE_BYTES", 4 * heads * width * rows)


def whole_rows(plan: Plan) -> list[list[int]]:
    """The set in force of each row, in KV slots; for methods with one set a row."""
    return [slots[:count].tolist() for slots, count in zip(plan.chosen.slots, plan.chosen.ends.tolist(), strict=True)]


def int32(values: list[int]) -> Tensor:
    """As lengths are on the device."""
    return torch.tensor(values, dtype=torch.int32)
