"""A general SGLang plugin for tests: records what each layer of a decode step was given and what it returned.

It records while the file `on` exists in the folder that `LIM_PROBE_DIR` names.
"""

import os
from pathlib import Path
from typing import Any


def plug() -> None:
    """Wrap what the backend runs for each layer."""
    from sgl_lim.serving.layer import LayerDecode

    original, recorder = LayerDecode.run, Recorder(Path(os.environ["LIM_PROBE_DIR"]))

    def run(decode: Any, plan: Any, role: Any, layer: Any) -> Any:
        out = original(decode, plan, role, layer)
        recorder.take(decode, plan, role, layer, out)
        return out

    LayerDecode.run = run


class Recorder:
    """Writes one file a layer, `<process>-<step>-<layer>.pt`, complete as soon as it has that name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan: Any = None
        self._steps = self._layer = 0

    def take(self, decode: Any, plan: Any, role: Any, layer: Any, out: Any) -> None:
        """Record one layer; layers are numbered by the order in which a step calls them."""
        import torch

        self._layer = self._layer + 1 if plan is self._plan else 0
        self._steps += plan is not self._plan
        self._plan = plan
        if not (self._folder / "on").exists():
            return
        slots, chosen = plan.context.slots.clone().long(), plan.chosen
        record = {
            "layer": self._layer,
            "role": role.value,
            "q": layer.q.clone(),
            "keys": layer.k_cache[slots],  # [B, L, H_kv, D]
            "values": layer.v_cache[slots],
            "slots": slots,
            "seq_lens": plan.seq_lens.clone(),
            "set_slots": None if chosen is None else chosen.slots.clone(),
            "set_counts": None if chosen is None else chosen.ends.clone(),
            "out": out.clone(),
            "scale": layer.scaling.scale,
            "first_head": decode.heads.first,
        }
        path = self._folder / f"{os.getpid()}-{self._steps:06d}-{self._layer:03d}.pt"
        torch.save(record, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
