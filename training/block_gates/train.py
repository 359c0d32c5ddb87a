"""Train gates of SeerAttention-R for a checkpoint, and save them as the authors publish theirs.

    PYTHONPATH=.:kernels:training python -m block_gates.train --model-path models/chain-tracer \\
        --out out/chain-tracer --block 16 --length 2400 --chains 1 --device cuda

The model is frozen. Rows are texts of installed packages and, by --chains, chain-tracing problems.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from source_reader.corpus import package_folders
from torch import Tensor

from sgl_lim.evaluate.checkpoint import Checkpoint, load
from sgl_lim.evaluate.own_pages import rotation_of
from sgl_lim.evaluate.step_rows import under_way
from sgl_lim.gates import GateConfig, save_gates
from sgl_lim.gates.config import BLOCKS, WIDTHS
from sgl_lim.gates.rotation import gate_rotation

from .data import ahead, batches, chain_rows, text_rows
from .model import GatePass, TrainedGates

FACTS = ("model_type", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
LEAST_LR = 0.01  # of the highest
DRAWING = 8
"""Threads that draw batches; a fixed number, for each has a seed of its own."""
APART = 10_000
"""Between their seeds."""


class Trainer:
    """Gates of a frozen checkpoint, and their optimiser."""

    def __init__(self, checkpoint: Checkpoint, config: GateConfig, *, lr: float) -> None:
        turned = rotation_of(checkpoint.model)
        if turned is None:
            raise ValueError(f"it cannot be told how {type(checkpoint.model).__name__} rotates keys")
        self._checkpoint = checkpoint
        self._turned = turned.rotation
        self._own = gate_rotation(config, checkpoint.shape.head_dim, turned.rotation, turned.theta)
        self.gates = TrainedGates(config, checkpoint.shape).to(checkpoint.model.device)
        self._optimiser = torch.optim.AdamW(self.gates.parameters(), lr=lr, weight_decay=0.0)

    def step(self, tokens: Tensor, lr: float) -> Tensor:
        """One update from int64 [B, T]; returns each layer's loss float32 [layers] before it."""
        losses = self.losses(tokens, learns=True)
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return losses

    @torch.no_grad()
    def losses(self, tokens: Tensor, *, learns: bool = False) -> Tensor:
        """Each layer's loss float32 [layers] on int64 [B, T]; with `learns` gradients are added up as well."""
        one = GatePass(self.gates, self._turned, self._own, learns=learns)
        model = self._checkpoint.model
        with under_way(one):
            model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=1)
        return torch.stack([one.losses[layer] for layer in sorted(one.losses)])

    def save(self, folder: Path) -> None:
        """Write the gates."""
        layers = range(self._checkpoint.depth)
        save_gates(folder, self.gates.config, [self.gates.parts(layer) for layer in layers])


def learning_rate(step: int, steps: int, *, most: float, warmup: int) -> float:
    """Warm-up, then a cosine to a hundredth."""
    if step < warmup:
        return most * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return most * (LEAST_LR + (1 - LEAST_LR) * 0.5 * (1 + math.cos(math.pi * done)))


def run(trainer: Trainer, draw: Callable[[], Tensor], held_out: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """Train for `args.steps` steps or `args.minutes`, whichever ends first; returns what was measured."""
    begin = time.monotonic()
    first = trainer.losses(held_out)
    step, done = 0, 0.0
    while step < args.steps and done < 1:
        planned = max(step / args.steps, done)
        lr = learning_rate(round(planned * args.steps), args.steps, most=args.lr, warmup=args.warmup)
        losses = trainer.step(draw(), lr)
        step += 1
        done = (time.monotonic() - begin) / (60 * args.minutes)
        if step % args.log_every == 0 or step == 1:
            print(f"{time.monotonic() - begin:6.0f}s step {step} lr {lr:.1e} loss {losses.mean():.4f}", flush=True)
    last = trainer.losses(held_out)
    return {
        "steps": step,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": args.batch,
        "length": args.length,
        "tokens": step * args.batch * args.length,
        "held_out_before": round(float(first.mean()), 4),
        "held_out_after": round(float(last.mean()), 4),
        "held_out_by_layer": [round(float(loss), 4) for loss in last],
    }


def gate_config(checkpoint: Checkpoint, model_path: str, *, block: int, width: int | None) -> GateConfig:
    """The authors' gates, with this block size and width; None for that of the model's heads."""
    text = checkpoint.model.config.get_text_config()
    return GateConfig(
        block=block,
        width=width or checkpoint.shape.head_dim,
        pools=("max", "min", "avg"),
        query="Qproj",
        norm=True,
        rotate=True,
        start_layer=0,
        base_model=Path(model_path).name,
        model={name: getattr(text, name) for name in FACTS if getattr(text, name, None) is not None},
    )


def draws(checkpoint: Checkpoint, args: argparse.Namespace, seed: int, count: int) -> Callable[[], Tensor]:
    """Batches of the kinds of rows that were asked for."""
    kinds = [(args.chains, chain_rows(checkpoint, args.length, seed))] if args.chains > 0 else []
    if args.chains < 1:
        kinds.append((1 - args.chains, text_rows(checkpoint, args.roots, args.length, seed)))
    return batches(kinds, count, seed)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the gates")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=64)
    parser.add_argument("--width", type=int, choices=WIDTHS, help="default: that of the model's heads")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--minutes", type=float, default=15.0, help="at most; the learning rate falls in time")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--chains", type=float, default=0.0, metavar="SHARE", help="of rows that are chains, 0 to 1")
    parser.add_argument("--roots", type=Path, nargs="+", default=package_folders()[:1], help="folders of packages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    dtype = "float32" if args.device == "cpu" else args.dtype
    checkpoint = load(args.model_path, device=args.device, dtype=dtype)
    config = gate_config(checkpoint, args.model_path, block=args.block, width=args.width)
    trainer = Trainer(checkpoint, config, lr=args.lr)
    held_out = draws(checkpoint, args, args.seed + 1_000_000, min(8, args.batch))()
    sources = [draws(checkpoint, args, args.seed + APART * n, args.batch) for n in range(DRAWING)]
    with ThreadPoolExecutor(DRAWING) as pool:
        measured = run(trainer, ahead(sources, pool), held_out, args)
    trainer.save(args.out)
    (args.out / "training.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
