"""What a calibration writes: the preset, every candidate as a row, and the picture of the frontier."""

import csv
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sgl_lim.calibrate.candidates import Candidate
from sgl_lim.calibrate.job import Job, Result
from sgl_lim.calibrate.options import Options
from sgl_lim.calibrate.outcome import Outcome
from sgl_lim.calibrate.plot import draw
from sgl_lim.command import how_to_install
from sgl_lim.evaluate.checkpoint import Checkpoint
from sgl_lim.settings.preset_file import Entry, PresetFile, rule_of

COLUMNS = (
    "budget", "part", "selection_layers", "attends", "full_reads", "tokens", "kl", "kl_error",
    "agreement", "agreement_low", "agreement_high",
    *(f"{task}_{name}" for task in ("needles", "chains") for name in ("items", "right", "dense_right", "lost_nats")),
    "keeps", "coverage",
)  # fmt: skip
"""Of the CSV."""


def preset_of(options: Options, job: Job, checkpoint: Checkpoint, results: Sequence[Result]) -> PresetFile:
    """The choices, with what was measured of them on what was held out."""
    entries = []
    for result in results:
        chosen = result.chosen
        measured = {"context": job.sizes.context, **chosen.measured(), "beside": _beside(result)}
        entries.append(Entry(result.budget, chosen.candidate.layers, chosen.candidate.attends, measured))
    config = checkpoint.model.config
    return PresetFile(
        architecture=(config.architectures or [type(checkpoint.model).__name__])[0],
        num_layers=checkpoint.depth,
        entries=tuple(entries),
        rule=rule_of(job.method(Candidate((0,), "context"), job.budgets[0])),
        calibration={
            "model": Path(options.model_path).name,
            "reads": job.space.reads,
            "max_dense": job.space.max_dense,
            "attends": list(job.space.attends),
            "context": job.sizes.context,
            "seed": options.seed,
            "prompts": {
                "files": [path.name for path in options.prompts],
                "chat": options.chat,
                "limit": options.limit,
                "max_tokens": options.max_tokens,
            },
            "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "transformers": version("transformers"),
            "sgl_lim": version("sgl-lim"),
            "machine": _machine(checkpoint),
        },
    )


def save(options: Options, job: Job, results: Sequence[Result], preset: PresetFile) -> list[Path]:
    """Write the files that were asked for; returns those written. Raises OSError."""
    if options.output is None or options.csv is None or options.picture is None:
        return []
    preset.write(options.output)
    _write_csv(options.csv, results)
    written = [options.output, options.csv]
    try:
        draw(options.picture, results, f"{Path(options.model_path).name}, items of {job.sizes.context:,} tokens")
        written.append(options.picture)
    except ImportError:
        print(f"no picture: matplotlib is not installed; {how_to_install('matplotlib')}", file=sys.stderr)
    return written


def _beside(result: Result) -> dict[str, object]:
    """What the references lose, in short."""
    return {
        name: {
            "selection_layers": list(one.candidate.layers),
            "attends": one.candidate.attends,
            "kl": round(one.divergence, 5),
            "agreement": round(one.agreement.value, 4),
        }
        for name, one in result.named.items()
    }


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    """A row for each candidate and part that it was decoded on, and one for each pair of layers with its coverage."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for result in results:
            held_out = {one.candidate: one for one in (result.chosen, *result.named.values(), *result.frontier)}
            for part, outcomes in (
                ("quick", result.quick),
                ("search", result.searched),
                ("held out", tuple(held_out.values())),
            ):
                writer.writerows(_row(result.budget, part, one) for one in outcomes)
            for i, row in enumerate(result.recall):
                writer.writerows(
                    {
                        "budget": result.budget,
                        "part": "coverage",
                        "selection_layers": i,
                        "attends": f"read at {j}",
                        "coverage": f"{row[j]:.6f}",
                    }
                    for j in range(i, len(row))
                )


def _row(budget: int, part: str, one: Outcome) -> dict[str, object]:
    found: dict[str, object] = {
        "budget": budget,
        "part": part,
        "selection_layers": "-".join(map(str, one.candidate.layers)),
        "attends": one.candidate.attends,
        "full_reads": f"{one.candidate.full_reads:g}",
        "tokens": one.tokens,
        "kl": f"{one.divergence:.6f}",
        "kl_error": "" if one.divergence_error is None else f"{one.divergence_error:.6f}",
        "agreement": f"{one.agreement.value:.4f}",
        "agreement_low": f"{one.agreement.low:.4f}",
        "agreement_high": f"{one.agreement.high:.4f}",
        "keeps": one.keeps,
    }
    for task, retrieval in one.retrieval.items():
        found[f"{task}_items"] = retrieval.items
        found[f"{task}_right"] = f"{retrieval.right.value:.4f}"
        found[f"{task}_dense_right"] = f"{retrieval.full:.4f}"
        found[f"{task}_lost_nats"] = f"{retrieval.lost_nats:.4f}"
    return found


def _machine(checkpoint: Checkpoint) -> str:
    """Device and versions, as results elsewhere carry them."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if checkpoint.model.device.type == "cuda" else cpu
    return f"{device}; Python {platform.python_version()}; torch {torch.__version__}"
