"""Installs the probe plugin for a server and reads what it recorded."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.outside_package import install

PLUGIN = Path(__file__).parent / "probe" / "lim_probe.py"


class Probe:
    """A folder that holds the plugin as an installed distribution, and the folder it records to."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._records.mkdir(parents=True)
        self._path = install(folder / "site", PLUGIN, "sglang.srt.plugins", "lim_probe:plug")

    @property
    def env(self) -> tuple[tuple[str, str], ...]:
        """Environment of a server that loads the plugin."""
        return (*self._path, ("LIM_PROBE_DIR", str(self._records)))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps that run inside, after forgetting earlier ones."""
        for path in self._records.glob("*.pt"):
            path.unlink()
        (self._records / "on").touch()
        try:
            yield
        finally:
            (self._records / "on").unlink()

    def steps(self, num_layers: int) -> list[list[dict[str, Any]]]:
        """The recorded steps in order, each a list of its layers' records; steps cut by start or end are left out."""
        deadline = time.monotonic() + 30
        while list(self._records.glob("*.part")) and time.monotonic() < deadline:
            time.sleep(0.05)
        layers: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(self._records.glob("*.pt")):
            _, step, layer = path.stem.split("-")
            layers[step, layer].append(torch.load(path))
        ranks = max(map(len, layers.values()))
        whole = [(step, merge_ranks(records)) for (step, _), records in sorted(layers.items()) if len(records) == ranks]
        steps = [[record for _, record in group] for _, group in itertools.groupby(whole, key=lambda item: item[0])]
        return [step for step in steps if [record["layer"] for record in step] == list(range(num_layers))]


def merge_ranks(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One layer's record over all heads, from the records of its tensor-parallel ranks.

    They must agree on the set, unless each KV head has its own.
    """
    first, *others = records = sorted(records, key=lambda record: record["first_head"])
    heads = {"q": 1, "out": 1, "keys": 2, "values": 2}
    shared = ["slots", "seq_lens"]
    if first["set_slots"] is not None and first["set_slots"].dim() == 3:  # [B, H_kv, K]
        heads |= {"set_slots": 1, "set_counts": 1}
    else:
        shared += ["set_slots", "set_counts"]
    for other in others:
        for name in shared:
            ours, theirs = first[name], other[name]
            same = (ours is None and theirs is None) or torch.equal(ours, theirs)
            assert same, f"layer {first['layer']}: ranks differ in {name}"
    if not others:
        return first
    return {**first, **{name: torch.cat([record[name] for record in records], dim) for name, dim in heads.items()}}
