"""Random LoRA adapters for the tiny checkpoint, as PEFT saves them."""

import json
from collections.abc import Sequence
from pathlib import Path

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder: Path, model: Path, *, seed: int, rank: int = 4, scale: float = 1.0) -> Path:
    """Write an adapter of the attention of every layer of the checkpoint `model`, and return `folder`.

    Its product has weights of about `scale` times those of the model, so that another adapter gives another answer.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if not name.endswith(tuple(f"{one}.weight" for one in PROJECTIONS)):
                continue
            weight = file.get_tensor(name)
            target = f"base_model.model.{name.removesuffix('.weight')}"
            size = scale * float(weight.std()) / rank**0.5
            weights[f"{target}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            weights[f"{target}.lora_B.weight"] = size * torch.randn(weight.shape[0], rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    config |= {"target_modules": list(PROJECTIONS), "bias": "none", "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_adapters(folder: Path, model: Path, names: Sequence[str]) -> list[str]:
    """Write different adapters of the checkpoint `model` in `folder`, and return what --lora-paths takes of them."""
    return [f"{name}={write_adapter(folder / name, model, seed=seed)}" for seed, name in enumerate(names)]
