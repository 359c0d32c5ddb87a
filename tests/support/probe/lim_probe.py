"""A general SGLang plugin for tests: records what each layer of a decode step was given and what it returned.

It records while the file `on` exists in the folder that `LIM_PROBE_DIR` names.
"""

import os
from pathlib import Path
from typing import Any


def plug() -> None:
    """Wrap the attention that the backend calls."""
    from sgl_lim.serving import backend

    original, recorder = backend.attend, Recorder(Path(os.environ["LIM_PROBE_DIR"]))

    def attend(method: Any, step: Any, role: Any, q: Any, k_cache: Any, v_cache: Any, **options: Any) -> Any:
        out = original(method, step, role, q, k_cache, v_cache, **options)
        recorder.take(step, role, q, k_cache, v_cache, out, options)
        return out

    backend.attend = attend


class Recorder:
    """Writes one file a layer, `<process>-<step>-<layer>.pt`, complete as soon as it has that name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step: Any = None
        self._steps = self._layer = 0

    def take(self, step: Any, role: Any, q: Any, k_cache: Any, v_cache: Any, out: Any, options: dict[str, Any]) -> None:
        """Record one layer; layers are numbered by the order in which a step calls them."""
        import torch

        self._layer = self._layer + 1 if step is self._step else 0
        self._steps += step is not self._step
        self._step = step
        if not (self._folder / "on").exists():
            return
        slots = step.slots.clone().long()
        record = {
            "layer": self._layer,
            "role": role.value,
            "q": q.clone(),
            "keys": k_cache[slots],  # [B, L, H_kv, D]
            "values": v_cache[slots],
            "slots": slots,
            "seq_lens": step.seq_lens.clone(),
            "set_slots": None if step.set_slots is None else step.set_slots.clone(),
            "set_counts": None if step.set_counts is None else step.set_counts.clone(),
            "out": out.clone(),
            "scale": options["scales"].scale,
            "first_head": options["heads"].first_head,
        }
        path = self._folder / f"{os.getpid()}-{self._steps:06d}-{self._layer:03d}.pt"
        torch.save(record, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
